// The page of a session by itself: for a second browser, a phone, or as a browser source in OBS. What
// it shows stands in the fragment of its address, which reaches no server and no server's log.

import { element } from "./element.js";
import { speak, t } from "./language.js";
import { View, loadStyle } from "./view.js";

export const linkTo = (session, token) => {
  const link = new URL("../live.html", import.meta.url);
  link.hash = new URLSearchParams({ session, token });
  return link.href;
};

export function openPage() {
  const { session, token, view } = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  speak(navigator.language);
  document.documentElement.lang = navigator.language;
  document.title = t("Live Stream");
  loadStyle();
  if (!session || !token) {
    const text = t("This address names no session. Copy a link from a Live Stream node that runs.");
    return document.body.replaceChildren(element("p", { className: "rf-sentence", textContent: text }));
  }
  const address = new URL("../../../api", import.meta.url).href;
  const shown = new View({ address, session, token, watch: linkTo(session, token) });
  document.body.classList.toggle("rf-alone", view === "video");
  document.body.replaceChildren(shown.element);
  window.addEventListener("hashchange", () => location.reload());
}
