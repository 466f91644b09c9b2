// What a user can set for all nodes, in ComfyUI's settings under "Memorization Guard". English here, other languages in locales/.

import { app } from "../../scripts/app.js";

const MODE = "MemorizationGuard.DefaultMode";
const HEIGHT = "MemorizationGuard.GraphHeight";
const GROUP = ["Memorization Guard", "New nodes"];

/** Height of the graph in a node that is added, in pixels. */
export const graphHeight = () => Number(app.extensionManager?.setting?.get(HEIGHT)) || 0;

app.registerExtension({
  name: "MemorizationGuard.Settings",

  settings: [
    {
      id: MODE,
      category: [...GROUP, "Mode"],
      name: "Mode of new guards",
      tooltip: "Only for nodes that are added from now on. Nodes in a workflow keep their mode.",
      type: "combo",
      // Not off: a guard that looks as if it watched, and does not, is worse than none.
      options: ["trace", "mitigate", "stop", "stop and end prompt"],
      defaultValue: "trace",
    },
    {
      id: HEIGHT,
      category: [...GROUP, "Height"],
      name: "Height of the graph in new nodes",
      tooltip: "In pixels. You can resize a node at any time.",
      type: "slider",
      attrs: { min: 200, max: 600, step: 10 },
      defaultValue: 230,
    },
  ],

  /** A node of a workflow gets its own values after this. */
  nodeCreated(node) {
    if (node.comfyClass !== "MemorizationGuard") return;
    const mode = app.extensionManager?.setting?.get(MODE);
    const widget = node.widgets?.find((each) => each.name === "mode");
    if (widget?.options?.values?.includes(mode)) widget.value = mode;
  },
});
