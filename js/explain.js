// What is told of a prompt, on its node: the verdict, the prompt with the words marked that call an image up, and the prompt without
// them. Everything that comes from a prompt is put into the page as text, never as HTML.

import { leave, placeOf, styled, takeOver, textBox } from "./panel.js";

export const EXPLANATION = "stability_explanation"; // name of the widget, and of the property that keeps what is shown
const NOTHING = "Queue the workflow: what the model remembers of the text is told here.";

/** What one node tells. It is kept in the node's properties, so that it is there again after a reload. */
export class Explanation {
  #node;
  #place = null; // key of the element, for the node that comes in the place of this one

  constructor(node) {
    this.#node = node;
    this.element = textBox();
    this.say(NOTHING);
  }

  attach() {
    this.#place = placeOf(this.#node);
    this.element = takeOver(this.#place, this.#node, EXPLANATION, this.element);
    this.restore();
  }

  detach() {
    leave(this.#place, this.element);
  }

  /** Shows what the node's properties hold: an entry a prompt, of which a list of texts gives several. */
  restore() {
    const told = this.#node.properties?.[EXPLANATION];
    if (Array.isArray(told) && told.length) this.element.replaceChildren(...told.map(entry));
    else this.say(NOTHING);
  }

  /** Shows a message instead. */
  say(message) {
    this.element.textContent = message;
  }
}

function entry({ verdict, pieces, without, note }) {
  const all = styled("div", { margin: "0 0 8px" });
  const list = Array.isArray(pieces) ? pieces : [];
  const text = line("");
  text.append(...list.map(marked));
  all.append(line(verdict, { fontWeight: "600" }), text);
  const words = list.filter(isMarked);
  if (words.length) {
    all.append(line("Marked words call an image up. How rare the prompt is with one of them alone:", FAINT));
    const each = styled("ul", { margin: "0 0 6px", padding: "0 0 0 16px" });
    for (const word of words) each.append(item(`${word.text}: ${word.rarity}`));
    all.append(each);
  }
  if (typeof without === "string") all.append(line("Without them, an ordinary prompt:", FAINT), line(without, QUOTED));
  if (note) all.append(line(note));
  return all;
}

const FAINT = { opacity: "0.8", margin: "0" };
const QUOTED = { borderLeft: "3px solid currentColor", paddingLeft: "8px" };

const isMarked = (piece) => typeof piece?.strength === "number";

/** A piece of the prompt. The stronger a word, the darker its ground and the thicker its line: neither needs to be seen in colour. */
function marked(piece) {
  if (!isMarked(piece)) return document.createTextNode(piece?.text ?? "");
  const strength = Math.min(Math.max(piece.strength, 0), 1);
  const word = styled("mark", {
    color: "inherit", borderRadius: "3px", padding: "0 1px", background: `rgba(230, 120, 40, ${0.15 + 0.35 * strength})`,
    textDecoration: `underline ${1 + 3 * strength}px`, textUnderlineOffset: "3px",
  });
  word.textContent = piece.text;
  word.title = `with this word alone of those marked: ${piece.rarity}`;
  return word;
}

function line(text, style = {}) {
  const element = styled("div", { margin: "0 0 6px", ...style });
  element.textContent = text ?? "";
  return element;
}

function item(text) {
  const element = document.createElement("li");
  element.textContent = text;
  return element;
}
