// Something more to do where a node or a widget already does something of its own.

export function after(target, name, then) {
  const before = target[name];
  target[name] = function (...given) {
    const result = before?.apply(this, given);
    then(...given);
    return result;
  };
}
