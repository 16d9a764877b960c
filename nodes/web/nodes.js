// Nodes by the id that the server knows them by: 3:12 is node 12 of the subgraph that node 3 is.

import { app } from "../../scripts/app.js";

export function nodeOf(id) {
  let graph = app.rootGraph ?? app.graph;
  const path = String(id).split(":");
  for (const part of path.slice(0, -1)) graph = graph?.getNodeById(part)?.subgraph;
  return graph?.getNodeById(path.at(-1));
}
