// The stability graph on the page of the WebUI, Forge and reForge: below a tab's gallery, while its task runs and after it.
//
// The host keeps the id of a tab's task in localStorage, which all pages of a browser share. It shows a progress bar while a page
// waits for its task. So a new bar means that a task of this page has begun. On a new page, a task from before a reload may still
// be running. Only in these two cases the server is asked for events, and only until the task is done.

// With the version that the host puts into the address of this file: the browser may have cached an older graph.js.
const { StabilityGraph, addStep, finishRun, startRun } = await import(`../js/graph.js${new URL(import.meta.url).search}`);

const PERIOD = 300; // milliseconds between an answer and the next question
const PATIENCE = 6; // failures in a row before it gives up; after each one it waits twice as long
const MOST_RUNS = 100; // the server keeps as many
const STYLE = `
:host{display:block}
section{box-sizing:border-box;display:flex;flex-direction:column;gap:4px;height:300px;min-height:200px;overflow:hidden;resize:vertical}
header{display:flex;flex:none;flex-wrap:wrap;align-items:center;gap:4px;max-height:76px;overflow:auto;font:12px/20px system-ui,sans-serif;
 color:var(--body-text-color-subdued,gray)}
header span{margin-right:8px}
header button{border:1px solid transparent;border-radius:6px;padding:0 8px;background:none;color:inherit;font:inherit;cursor:pointer}
header button:hover,header button[aria-pressed=true]{color:var(--body-text-color,inherit)}
header button[aria-pressed=true]{border-color:var(--border-color-primary,gray)}
header button:only-of-type{display:none}
main{flex:1 1 0;min-height:0}
`;

/** The graph of a tab's task, and a button for each run if there are several (batches, the second pass, a comparison). */
class Panel {
  #runs = new Map(); // name -> {run, button}
  #shown = null; // name of the run on show
  #element = make("div");
  #header = make("header");
  #graph;

  constructor() {
    const section = make("section");
    const main = make("main");
    section.setAttribute("aria-label", "Memorization Guard");
    section.append(this.#header, main);
    this.#header.append(make("span", "Memorization Guard"));
    // The host calls every extension when its page changes. Changes inside a shadow root do not count.
    this.#element.attachShadow({ mode: "open" }).append(make("style", STYLE), section);
    this.#graph = new StabilityGraph(main);
    new MutationObserver(() => this.#draw()).observe(document.body, { attributes: true, attributeFilter: ["class"] });
  }

  /** Takes in an event. The first one puts the panel after the element `place`. */
  take({ kind, run: name, title, ...data }, place) {
    if (!this.#element.isConnected) place.after(this.#element);
    if (kind === "begin" || !this.#runs.has(name)) {
      const newest = [...this.#runs.keys()].at(-1);
      this.#drop(name);
      const button = make("button", title ?? name);
      button.type = "button";
      button.setAttribute("aria-pressed", "false");
      button.addEventListener("click", () => this.#show(name));
      this.#header.append(button);
      this.#runs.set(name, { run: startRun(data), button });
      if (this.#runs.size > MOST_RUNS) this.#drop(this.#runs.keys().next().value);
      // A user who looks at an earlier run keeps seeing it.
      if (this.#shown === newest || !this.#runs.has(this.#shown)) this.#show(name);
    }
    const entry = this.#runs.get(name);
    if (kind === "step") addStep(entry.run, data);
    if (kind === "end") finishRun(entry.run, data.traces);
    if (kind === "images") entry.infotexts = data.infotexts;
    this.#draw();
  }

  /**
   * Shows the run of the image of this infotext; of several (a grid, a second pass) the one that is on show, or the newest. Says
   * whether there is one.
   */
  showImage(infotext) {
    const found = [...this.#runs].filter(([, { infotexts }]) => infotexts?.includes(infotext));
    if (!found.length) return false;
    const [name, { run, infotexts }] = found.find(([name]) => name === this.#shown) ?? found.at(-1);
    const index = infotexts.indexOf(infotext);
    run.chosen = index < run.items.length ? index : null;
    this.#show(name);
    return true;
  }

  /** No more events will come. Ends runs that were interrupted, too. */
  end() {
    for (const { run } of this.#runs.values()) if (!run.finished) finishRun(run, []);
    this.#draw();
  }

  clear() {
    this.#element.remove();
    for (const name of [...this.#runs.keys()]) this.#drop(name);
    this.#shown = null;
  }

  #drop(name) {
    this.#runs.get(name)?.button.remove();
    this.#runs.delete(name);
  }

  #show(name) {
    this.#shown = name;
    for (const [each, { button }] of this.#runs) button.setAttribute("aria-pressed", String(each === name));
    this.#draw();
  }

  #draw() {
    // Gradio sets a class when it is dark, and nothing when it is light.
    this.#element.dataset.theme = document.body.classList.contains("dark") ? "dark" : "light";
    this.#graph.show(this.#runs.get(this.#shown)?.run);
  }
}

/** A tab that generates images, and its latest task. The panel follows its gallery's selection. */
class Tab {
  #name;
  #selected = null; // infotext of the image that the panel has followed to
  #panel = new Panel();
  #gallery = null;
  #bar = null; // the host's progress bar, while the page waits for a task
  #watch = null; // a new object for each task

  constructor(name) {
    this.#name = name;
  }

  /** Called after every change of the page. */
  look() {
    const gallery = gradioApp().querySelector(`#${this.#name}_gallery_container`);
    if (!gallery) return;
    const bar = gallery.parentNode.querySelector(":scope > .progressDiv");
    const begun = !this.#gallery || (bar && bar !== this.#bar);
    if (gallery !== this.#gallery) {
      const selections = new MutationObserver(() => this.#select());
      selections.observe(gallery, { attributes: true, attributeFilter: ["class"], childList: true, subtree: true });
    }
    this.#gallery = gallery;
    this.#bar = bar;
    if (begun) this.#follow(localStorage.getItem(`${this.#name}_task_id`)).catch(complain);
  }

  /** Draws what the server tells of a task, until the task is done or another one has begun. */
  async #follow(task) {
    const watch = (this.#watch = {});
    this.#panel.clear();
    this.#selected = null;
    let cursor = 0;
    let failures = 0;
    while (task && failures < PATIENCE) {
      const answer = await ask(task, cursor);
      if (this.#watch !== watch) return;
      failures = answer ? 0 : failures + 1;
      if (answer) {
        cursor = answer.cursor;
        for (const event of answer.events) {
          if (event.kind === "profiles") refreshProfiles();
          else this.#panel.take(event, this.#gallery);
        }
        this.#select();
        // The server learns of a task later than the page does: while there is a bar, the page keeps asking.
        if (!answer.running && !answer.events.length && !this.#bar?.isConnected) break;
      }
      await new Promise((done) => setTimeout(done, PERIOD * 2 ** failures));
      if (this.#watch !== watch) return;
    }
    this.#panel.end();
  }

  /** Shows the run of the image that is selected in the gallery, unless it did so already. */
  #select() {
    const index = [...this.#gallery.querySelectorAll(".thumbnail-small")].findIndex((e) => e.classList.contains("selected"));
    const infotext = infotextsOf(this.#name)[Math.max(index, 0)]; // a gallery of one image has no row of small ones
    if (infotext !== this.#selected && this.#panel.showImage(infotext)) this.#selected = infotext;
  }
}

/** The infotexts of a tab's gallery, as the host keeps them in the page. */
function infotextsOf(tab) {
  const told = gradioApp().querySelector(`#generation_info_${tab} textarea`)?.value;
  return (told && JSON.parse(told).infotexts) || [];
}

/** Brings the lists of profiles up to date, in both tabs. */
function refreshProfiles() {
  for (const button of gradioApp().querySelectorAll("[id^=memorization_guard_][id$=_profile_refresh]")) button.click();
}

/** The server's answer, or null if there is none. The address is relative, since the page may stand below a path. */
async function ask(task, cursor) {
  try {
    const question = new URLSearchParams({ task, cursor });
    const response = await fetch(`./memorization-guard/live?${question}`, { signal: AbortSignal.timeout(10000) });
    return response.ok ? await response.json() : null;
  } catch {
    return null; // the server is gone or slow: it is asked again
  }
}

function make(tag, text = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  return element;
}

const complain = (error) => console.error("Memorization Guard cannot draw its graph:", error);

const tabs = ["txt2img", "img2img"].map((name) => new Tab(name));
const look = () => tabs.forEach((tab) => tab.look());
onUiUpdate(look);
look();
// A new page has the lists as they were when the server began. Gradio hears of no click before it is done with the page; its user
// makes none before.
document.addEventListener("pointerdown", refreshProfiles, { once: true });
