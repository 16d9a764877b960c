// EMA-Sink Config shows what its preset sets, greyed; Custom frees the values. The presets come with
// the node's definition, and the server holds to them whatever the widgets say.

import { app } from "../../scripts/app.js";
import { after } from "./after.js";

const CLASS = "RFSinkConfig";
let presets = {};

function show(node) {
  const preset = node.widgets.find((widget) => widget.name === "preset");
  const linked = node.inputs.some((input) => input.widget?.name === "preset" && input.link != null);
  const values = linked ? undefined : presets[preset.value];
  for (const widget of node.widgets) {
    if (widget === preset) continue;
    widget.disabled = values !== undefined;
    if (values) widget.value = values[widget.name];
  }
}

// The canvas leaves out what a disabled widget holds; so it is drawn as if it were not, still faint.
function drawWhole(widget) {
  const draw = widget.drawWidget;
  if (!draw) return;
  widget.drawWidget = function (...given) {
    const disabled = this.computedDisabled;
    if (this.disabled) this.computedDisabled = false;
    draw.apply(this, given);
    this.computedDisabled = disabled;
  };
}

app.registerExtension({
  name: "RewardForcing.SinkConfig",
  beforeRegisterNodeDef(nodeType, { name, input }) {
    if (name === CLASS) presets = input.required.preset[1].presets;
  },
  nodeCreated(node) {
    if (node.comfyClass !== CLASS) return;
    const update = () => show(node);
    for (const widget of node.widgets) {
      if (widget.name === "preset") after(widget, "callback", update);
      else drawWhole(widget);
    }
    after(node, "onConfigure", update);
    after(node, "onConnectionsChange", update);
    update();
  },
});
