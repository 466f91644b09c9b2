// What a node that holds other nodes, a subgraph or a group, shows of the guards in it: a badge with the verdict.

import { VERDICTS } from "./graph.js";
import { promptOf } from "./panel.js";

/** Whether other nodes are inside of `node`. */
export const holds = (node) => Boolean(node.subgraph) || String(node.comfyClass).startsWith("workflow>");

/** Gives a node its badge, which is there whenever the node's properties hold a state. */
export function badge(node) {
  const badge = new LGraphBadge({ text: "" });
  node.badges.push(() => {
    badge.text = node.properties?.stability_state?.text ?? "";
    return badge;
  });
}

/** The state that a run leaves on the nodes around its guard. */
export function stateOf(one) {
  const verdicts = one.run.items.map((item) => item.verdict);
  const worst = VERDICTS.find((verdict) => verdicts.includes(verdict));
  const count = verdicts.filter((verdict) => verdict === worst).length;
  let words = worst === "corrected" ? "likely copy, corrected" : (worst ?? "nothing is watched");
  if (verdicts.length > 1) words += ` (${count} of ${verdicts.length})`;
  return { prompt: promptOf(one), worst: worst ?? null, text: `Memorization Guard: ${words}` };
}

/** Puts a state on a node, or on its saved form. Of several runs of one prompt the worst verdict stands. */
export function put(node, state) {
  if (!node) return;
  node.properties ??= {};
  const before = node.properties.stability_state;
  const order = [...VERDICTS, null];
  if (before?.prompt === state.prompt && order.indexOf(before.worst) < order.indexOf(state.worst)) return;
  node.properties.stability_state = state;
}
