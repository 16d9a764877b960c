// What a node of the pack has to say is shown on it, and a finished stream's video in place of its
// last preview, which ComfyUI's frontend would leave there.

import { app } from "../../scripts/app.js";
import { ComfyWidgets } from "../../scripts/widgets.js";

const TOLD = "result";

function tell(node, text) {
  let widget = node.widgets?.find((each) => each.name === TOLD);
  if (!widget) {
    const options = ["STRING", { multiline: true, socketless: true }];
    widget = ComfyWidgets.STRING(node, TOLD, options, app).widget;
    widget.serialize = false;
    widget.options.serialize = false;
    if (widget.inputEl) widget.inputEl.readOnly = true;
    const [width, height] = node.computeSize();
    node.setSize([Math.max(width, node.size[0]), Math.max(height, node.size[1])]);
  }
  widget.value = text;
}

// The frontend shows one of two things a node has, live previews before the finished video, and
// keeps the first of them for good. So a run begins with neither and ends without previews.

const MEDIA = ["video-preview", "$$canvas-image-preview", "$$comfy_animation_preview"];

function outputStore() {
  const frontend = document.getElementById("vue-app")?.__vue_app__;
  return frontend?.config.globalProperties.$pinia?._s.get("nodeOutput");
}

function dropPreviews(node) {
  const store = outputStore();
  for (const key of Object.keys(app.nodePreviewImages)) {
    if (key.split(":").at(-1) !== String(node.id)) continue;
    if (store) store.revokePreviewsByLocatorId(key);
    else delete app.nodePreviewImages[key];
  }
  for (const widget of [...(node.widgets ?? [])]) {
    if (!MEDIA.includes(widget.name)) continue;
    widget.onRemove?.();
    node.widgets.splice(node.widgets.indexOf(widget), 1);
  }
  node.imgs = node.images = node.preview = node.videoContainer = undefined;
  node.previewMediaType = undefined;
}

function dropVideo(node) {
  dropPreviews(node);
  outputStore()?.removeNodeOutputsForNode?.(node);
}

function makeRoom(node, tries = 60) {
  const video = node.widgets?.find((widget) => widget.name === MEDIA[0]);
  const bottom = video ? video.y + (video.computedHeight ?? 0) + 8 : 0;
  if (node.size[1] < bottom) node.setSize([node.size[0], bottom]);
  if (tries) setTimeout(() => makeRoom(node, tries - 1), 250); // the video is still loading
}

function after(type, name, act) {
  const before = type.prototype[name];
  type.prototype[name] = function (...args) {
    before?.apply(this, args);
    act(this, ...args);
  };
}

app.registerExtension({
  name: "RewardForcing.Outputs",
  beforeRegisterNodeDef(type, data) {
    if (!data.name.startsWith("RF")) return;
    after(type, "onExecuted", (node, output) => {
      if (output?.text) tell(node, [output.text].flat().join("\n"));
    });
    if (data.name !== "RFStreamingSampler") return;
    after(type, "onExecuted", (node) => {
      dropPreviews(node);
      makeRoom(node);
    });
    after(type, "onExecutionStart", dropVideo);
  },
});
