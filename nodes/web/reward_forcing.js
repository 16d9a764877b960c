// The pictures of a stream as they are made, moving, on the node that makes them. They come as JPEGs
// with each chunk and are shown at the pace they are made for; the finished video takes their place.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { keepHeight } from "./height.js";
import { nodeOf } from "./nodes.js";

const MOST = 64; // pictures that wait to be shown: some chunks; then the oldest go
const WIDTH = 270; // a title beside the badge of the pack
const players = new Map();

class Player {
  constructor(node) {
    this.node = node;
    this.size = [...node.size];
    this.waiting = [];
    this.canvas = document.createElement("canvas");
    this.canvas.style.cssText = "width: 100%; height: 100%; object-fit: contain;";
    const options = { serialize: false, getMinHeight: () => 180 };
    this.widget = node.addDOMWidget("pictures", "pictures", this.canvas, options);
    this.widget.serialize = false;
  }

  add(pictures, rate) {
    this.waiting.push(...pictures);
    this.waiting.splice(0, this.waiting.length - MOST);
    this.timer ??= setInterval(() => this.show(), 1000 / rate);
  }

  async show() {
    const next = this.waiting.shift();
    if (!next) return;
    const bytes = Uint8Array.from(atob(next), (letter) => letter.charCodeAt(0));
    const picture = await createImageBitmap(new Blob([bytes], { type: "image/jpeg" }));
    if (this.canvas.width !== picture.width) this.canvas.width = picture.width;
    if (this.canvas.height !== picture.height) this.canvas.height = picture.height;
    this.canvas.getContext("2d").drawImage(picture, 0, 0);
    this.canvas.dataset.shown = 1 + Number(this.canvas.dataset.shown ?? 0);
  }

  end() {
    clearInterval(this.timer);
    this.node.removeWidget(this.widget);
    this.node.setSize(this.size); // what the video needs beyond it, the frontend adds
  }
}

function show({ detail: { node: id, pictures, rate } }) {
  const node = nodeOf(id);
  if (!node) return;
  if (players.get(id)?.node !== node) players.set(id, new Player(node));
  players.get(id).add(pictures, rate);
}

function end(id) {
  players.get(id)?.end();
  players.delete(id);
}

app.registerExtension({
  name: "RewardForcing",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("RF")) return;
    if (node.size[0] < WIDTH) node.setSize([WIDTH, node.size[1]]);
    if (node.comfyClass === "RFStreamingSampler") keepHeight(node);
  },
  setup() {
    api.addEventListener("rf.pictures", show);
    api.addEventListener("executed", ({ detail }) => end(detail.node));
    for (const name of ["execution_error", "execution_interrupted", "execution_success"])
      api.addEventListener(name, () => [...players.keys()].forEach(end));
  },
});
