
// What the page of an audit does, after the source of graph.js: it draws graphs when they come near, and the table. Texts of
// prompts are put into the page as text, never as HTML.
(async () => {
  /** What `_packed` in pieces.py wrote into the element of this id, or null. */
  async function unpack(id) {
    const element = document.getElementById(id);
    if (!element) return null;
    const text = atob(JSON.parse(element.textContent));
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
  }

  function drawGraphs(traces) {
    const draw = (box) => {
      if (!traces[box.dataset.trace]) return;
      box.replaceChildren();
      new StabilityGraph(box, { compact: true }).show(runOf([traces[box.dataset.trace]]));
    };
    const near = new IntersectionObserver((entries) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting) continue;
        near.unobserve(target);
        draw(target);
      }
    }, { rootMargin: "500px" });
    for (const box of document.querySelectorAll("[data-trace]")) near.observe(box);
    // Printing shows every graph, scrolled to or not.
    addEventListener("beforeprint", () => {
      for (const box of document.querySelectorAll("[data-trace]")) if (!box.querySelector(".mg-view")) draw(box);
    });
  }

  function element(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  const HEIGHT = 30; // of a row, as in the style
  const GAP = 12; // between columns, as in the style
  const SPARE = 12; // rows drawn beyond what is seen

  function showTable(box, data) {
    const total = data.image.length;
    const callOf = (i) => data.calls[data.call?.[i]];
    const quoted = (words) => words.map((word) => `"${word}"`).join(", ");
    /** The prompt of a row, with the words marked that call its image up: every second piece is one. */
    const promptOf = (i) => callOf(i)?.pieces.map((piece, n) => (n % 2 ? element("mark", "", piece) : piece)) ?? data.prompts[data.prompt[i]];
    const rareText = (share) => rarity(share, data.p_value_floor).replace("rarer than", "<");
    const columns = [
      { key: "verdict", title: "verdict", width: "84px", show: (i) => data.verdicts[data.verdict[i]] },
      { key: "p_value", title: "as rare as", width: "112px", right: true, show: (i) => (data.p_value[i] === null ? "-" : rareText(data.p_value[i])) },
      { key: "prompt", title: "prompt", width: "minmax(220px,1fr)", show: promptOf },
      { key: "call", title: "called up by", width: "minmax(96px,.4fr)", show: (i) => (data.call[i] === null ? "-" : quoted(callOf(i).words)) },
      { key: "kind", title: "kind", width: "96px", show: (i) => (data.kind[i] === null ? "-" : data.kinds[data.kind[i]]) },
      { key: "score", title: "S_mem", width: "64px", right: true, down: true, show: (i) => (data.score[i] === null ? "-" : data.score[i].toFixed(1)) },
      { key: "trigger", title: "trigger", width: "62px", right: true, show: (i) => data.trigger[i] ?? "-" },
      { key: "corrected", title: "corrected", width: "74px", right: true, down: true, show: (i) => data.corrected[i] },
      { key: "sampled", title: "sampled", width: "96px", show: (i) => (data.sampled[i] ? "yes" : "screened out") },
      { key: "seed", title: "seed", width: "92px", right: true, show: (i) => data.seed[i] },
      { key: "image", title: "image", width: "72px", right: true, show: (i) => data.image[i] },
    ].filter(({ key }) => data[key]);
    const widths = columns.map(({ width }) => width).join(" ");
    const least = columns.reduce((sum, { width }) => sum + GAP + parseInt(width.match(/\d+/)[0]), GAP); // columns at their narrowest
    const lower = data.prompts.map((prompt) => prompt.toLowerCase());
    const triggered = (i) => data.verdict[i] < data.triggered; // these verdicts come first

    let sort = { key: null, down: false }; // null: the order of the data, the rarest first
    let shown = null; // numbers of the rows, in order
    let chosen = null;
    const orders = new Map();

    function ordered() {
      const name = `${sort.key} ${sort.down}`;
      if (!orders.has(name)) {
        const order = Uint32Array.from({ length: total }, (_, i) => i);
        if (sort.key) {
          // Missing values come last in both directions.
          const last = sort.down ? -Infinity : Infinity;
          const values = Float64Array.from(data[sort.key], (value) => value ?? last);
          order.sort(sort.down ? (a, b) => values[b] - values[a] || a - b : (a, b) => values[a] - values[b] || a - b);
        }
        orders.set(name, order);
      }
      return orders.get(name);
    }

    // ------------------------------------------------------------------------------------------------------------- filters
    const filters = element("div", "filters");
    const search = element("input");
    Object.assign(search, { type: "search", placeholder: "Search in prompts" });
    search.setAttribute("aria-label", "Search in prompts");
    const choice = (title, names) => {
      const select = element("select");
      select.setAttribute("aria-label", title);
      select.append(new Option(title, ""), ...names.map((name, number) => new Option(name, number)));
      return select;
    };
    const present = new Set(data.verdict);
    const verdict = choice("every verdict", data.verdicts);
    for (const option of [...verdict.options].slice(1)) if (!present.has(+option.value)) option.remove();
    const kind = choice("every kind", data.kinds);
    const word = choice("every word", data.words);
    word.setAttribute("aria-label", "called up by");
    const only = element("input");
    only.type = "checkbox";
    const onlyLabel = element("label");
    onlyLabel.append(only, "only triggered");
    const told = element("span", "muted");
    told.setAttribute("role", "status");
    filters.append(search, verdict, ...(data.kind ? [kind] : []), ...(data.call ? [word] : []), onlyLabel, told);

    function filter() {
      const order = ordered();
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const fits = words.length ? Uint8Array.from(lower, (prompt) => words.every((word) => prompt.includes(word))) : null;
      const wantVerdict = verdict.value === "" ? null : +verdict.value;
      const wantKind = kind.value === "" ? null : +kind.value;
      const wantWord = word.value === "" ? null : data.words[+word.value];
      shown = order.filter(
        (i) =>
          (!fits || fits[data.prompt[i]]) &&
          (wantVerdict === null || data.verdict[i] === wantVerdict) &&
          (wantKind === null || data.kind[i] === wantKind) &&
          (wantWord === null || callOf(i)?.words.includes(wantWord)) &&
          (!only.checked || triggered(i)),
      );
      told.textContent = `${shown.length.toLocaleString("en")} of ${total.toLocaleString("en")}`;
      body.style.height = `${shown.length * HEIGHT}px`;
      rows.setAttribute("aria-rowcount", shown.length + 1);
      rows.scrollTop = 0;
      draw();
    }
    for (const input of [search, verdict, kind, word, only]) input.addEventListener("input", filter);

    // --------------------------------------------------------------------------------------------------------------- rows
    const rows = element("div", "rows");
    rows.tabIndex = 0;
    rows.setAttribute("role", "table");
    rows.setAttribute("aria-label", "Images");
    rows.style.setProperty("--least", `${least}px`);
    const head = element("div", "row head");
    head.setAttribute("role", "row");
    head.style.gridTemplateColumns = widths;
    for (const column of columns) {
      const cell = element("span", column.right ? "cell right" : "cell");
      cell.setAttribute("role", "columnheader");
      const button = element("button", "", column.title);
      button.type = "button";
      button.title = `Sort by ${column.title}`;
      button.addEventListener("click", () => {
        const first = Boolean(column.down); // scores begin with the highest
        sort = sort.key !== column.key ? { key: column.key, down: first } : { key: column.key, down: !sort.down };
        for (const other of head.children) other.removeAttribute("aria-sort");
        cell.setAttribute("aria-sort", sort.down ? "descending" : "ascending");
        filter();
      });
      cell.append(button);
      head.append(cell);
    }
    const body = element("div", "body");
    rows.append(head, body);

    function draw() {
      const first = Math.max(0, Math.floor(rows.scrollTop / HEIGHT) - SPARE);
      const end = Math.min(shown.length, Math.ceil((rows.scrollTop + rows.clientHeight) / HEIGHT) + SPARE);
      const made = [];
      for (let at = first; at < end; at++) {
        const i = shown[at];
        const row = element("div", "row");
        row.setAttribute("role", "row");
        row.setAttribute("aria-rowindex", at + 2);
        if (i === chosen) row.setAttribute("aria-selected", "true");
        row.style.cssText = `top:${at * HEIGHT}px;grid-template-columns:${widths}`;
        row.dataset.at = at;
        for (const column of columns) {
          const cell = element("span", column.right ? "cell right" : "cell");
          cell.append(...[column.show(i)].flat());
          cell.setAttribute("role", "cell");
          if (column.key === "verdict" && triggered(i)) cell.classList.add("bad");
          row.append(cell);
        }
        made.push(row);
      }
      body.replaceChildren(...made);
    }
    let waiting = false;
    const soon = () => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => {
        waiting = false;
        draw();
      });
    };
    rows.addEventListener("scroll", soon, { passive: true });
    new ResizeObserver(soon).observe(rows);

    // A row is cut off at the end of its line, so the chosen row is written out below.
    const detail = element("div", "chosen");
    detail.setAttribute("aria-live", "polite");
    function choose(at) {
      if (!(at >= 0 && at < shown.length)) return;
      const i = (chosen = shown[at]);
      const parts = columns.filter(({ key }) => key !== "prompt").map((column) => `${column.title} ${column.show(i)}`);
      if (callOf(i)) parts.push(`ordinary without: ${callOf(i).without}`);
      const prompt = element("b");
      prompt.append(...[promptOf(i)].flat());
      detail.replaceChildren(prompt, element("span", "muted", parts.join(" · ")));
      // Only a name that is surely a file of this audit becomes a link.
      const file = data.file?.[i];
      if (file && /^images\/[\w./-]+$/.test(file) && !file.includes("..")) {
        const link = element("a", "", file);
        link.href = file;
        detail.append(" · ", link);
      }
      const top = at * HEIGHT;
      const view = rows.clientHeight - head.offsetHeight;
      if (top < rows.scrollTop) rows.scrollTop = top;
      else if (top + HEIGHT > rows.scrollTop + view) rows.scrollTop = top + HEIGHT - view;
      draw();
    }
    body.addEventListener("click", (event) => choose(Number(event.target.closest(".row")?.dataset.at)));
    rows.addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!step || event.target !== rows) return;
      event.preventDefault();
      const at = shown.indexOf(chosen);
      choose(at < 0 ? Math.floor(rows.scrollTop / HEIGHT) : Math.min(Math.max(at + step, 0), shown.length - 1));
    });
    detail.textContent = "Choose a row to read its whole prompt.";
    detail.classList.add("muted");

    box.replaceChildren(filters, rows, detail);
    filter();
  }

  const traces = await unpack("traces");
  if (traces) drawGraphs(traces);
  const table = document.getElementById("table");
  if (table) showTable(table, await unpack("table-data"));
})();
