// Live Stream's node: its player and panel stand on it while it runs. Which sessions are live is kept
// in the browser, so that a page that is loaded again finds them.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { after } from "./after.js";
import { keepHeight } from "./height.js";
import { element } from "./live/element.js";
import { speak, t } from "./live/language.js";
import { linkTo } from "./live/page.js";
import { View, loadStyle } from "./live/view.js";
import { nodeOf } from "./nodes.js";

const CLASS = "RFLiveStream";
const KEPT = "rf.live";
const MOST = 8; // sessions that are kept
const WIDTH = 420; // a panel that can be read
const IDLE = 30; // pixels
const MARGIN = 8; // around it
const NEW = /^[0-]*$/; // the id of a graph that has never been loaded

const idleWords = () => t("Run it to go live: the picture and its controls open here.");
const stages = new Map(); // by node

const graphId = () => String((app.rootGraph ?? app.graph)?.id ?? "");

function kept() {
  try {
    return JSON.parse(localStorage.getItem(KEPT) ?? "[]");
  } catch {
    return [];
  }
}

const keep = (sessions) => localStorage.setItem(KEPT, JSON.stringify(sessions.slice(-MOST)));
const forget = (session) => keep(kept().filter((each) => each.session !== session));

const localeNow = () => app.extensionManager?.setting?.get("Comfy.Locale") ?? navigator.language;

// Where a node's session is shown.
class Stage {
  constructor(node) {
    this.node = node;
    speak(localeNow());
    this.idle = element("div", { className: "rf-idle", textContent: idleWords() });
    this.element = element("div", {}, this.idle);
    const getMinHeight = () => (this.view ? this.view.body.offsetHeight : IDLE) + 2 * MARGIN;
    const options = { serialize: false, hideOnZoom: false, margin: MARGIN, getMinHeight };
    this.widget = node.addDOMWidget("live", "live", this.element, options);
    this.widget.serialize = false;
    keepHeight(node, () => this.view);
  }

  begin({ session, token }) {
    if (this.session === session) return;
    this.end();
    speak(localeNow());
    Object.assign(this, { session, size: [...this.node.size] });
    const watch = linkTo(session, token);
    const onOver = (over) => this.over(over);
    this.view = new View({ address: api.apiURL(""), session, token, watch, onOver });
    this.sizes = new ResizeObserver(() => this.node.setDirtyCanvas(true, true));
    this.sizes.observe(this.view.body);
    this.element.replaceChildren(this.view.element);
  }

  over({ chunk, why }) {
    this.done(why ?? (chunk == null ? idleWords() : t("Ended at chunk {chunk}.", { chunk })));
  }

  // Its run is, which may be heard of before the stream says so.
  done(words) {
    if (this.session) forget(this.session);
    this.end(words);
  }

  end(words = idleWords()) {
    if (!this.view) return;
    this.sizes.disconnect();
    this.view.close();
    this.view = this.session = null;
    this.idle.textContent = this.idle.title = words;
    this.element.replaceChildren(this.idle);
    this.node.setSize(this.size); // what the video needs beyond it, the frontend adds
  }
}

function show(live) {
  if (live.graph !== graphId() && !NEW.test(live.graph)) return; // of another workflow
  const stage = stages.get(nodeOf(live.node));
  if (!stage) return;
  forget(live.session);
  keep([...kept(), { ...live, graph: graphId() }]);
  stage.begin(live);
}

function begin({ detail: { node, session, token } }) {
  const live = { node, session, token, graph: graphId() };
  keep([...kept(), live]);
  show(live);
}

app.registerExtension({
  name: "RewardForcing.Live",
  nodeCreated(node) {
    if (node.comfyClass !== CLASS) return;
    loadStyle();
    if (node.size[0] < WIDTH) node.setSize([WIDTH, node.size[1]]);
    stages.set(node, new Stage(node));
    after(node, "onRemoved", () => {
      stages.get(node)?.end();
      stages.delete(node);
    });
  },
  afterConfigureGraph: () => kept().forEach(show),
  setup() {
    api.addEventListener("rf.live", begin);
    api.addEventListener("executed", ({ detail: { node, output } }) => {
      if (!output?.suspended) stages.get(nodeOf(node))?.done(); // else it goes on in another run
    });
  },
});
