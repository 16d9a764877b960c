// What a node shows makes it taller only while it shows it: a workflow keeps its height without.

import { after } from "./after.js";

export function keepHeight(node, shows = () => false) {
  const own = node.widgets.length; // more: it shows something
  let height = node.size[1];
  after(node, "onConfigure", (saved) => (height = saved.size[1]));
  after(node, "onSerialize", (saved) => {
    if (node.widgets.length > own || shows()) saved.size = [saved.size[0], height];
    else height = saved.size[1];
  });
  after(node, "onResize", () => node.setDirtyCanvas(true, true)); // the video comes after the drawing
}
