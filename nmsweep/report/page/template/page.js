"use strict";
(() => {
  // Words of records reach the page as text nodes only, never as markup.
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const make = (tag, properties = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) name.includes("-") || name === "for" || name === "role" ? node.setAttribute(name, value) : (node[name] = value);
    node.append(...children);
    return node;
  };
  const svg = (tag, properties = {}, ...children) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(properties)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  };
  const word = (field, row) => data.words[data.fields[field][row]];
  const known = (value) => value !== null && value !== undefined;
  const shown = (value, kind) => (known(value) ? (value * kind.scale).toFixed(kind.digits) : "–");
  const rows = [...Array(data.n).keys()];

  /* ---- table ---- */
  const PAGE = 100;
  const sparse = rows.filter((row) => word("pattern", row) !== "dense");
  const varies = (field) => new Set((sparse.length ? sparse : rows).map((row) => data.fields[field][row])).size > 1;
  const words = Object.keys(data.fields).filter((field) => !["revision", "tasks"].includes(field) && (field === "pattern" || field === "model" || varies(field)));
  const numbers = data.numbers.filter((kind) => data.values[kind.name].some(known));
  const state = { sort: null, down: false, page: 0, shown: rows };

  const filters = { text: make("input", { type: "search", placeholder: "any word", id: "filter-text" }) };
  $("filters").append(make("label", { for: "filter-text" }, "Search", filters.text));
  for (const field of words) {
    const choices = [...new Set(data.fields[field])].sort((a, b) => data.order[a] - data.order[b]);
    if (choices.length < 2) continue;
    const select = make("select", { id: `filter-${field}` });
    if (field !== "data") select.append(make("option", { value: "" }, "all")); // mini and real numbers are never mixed
    for (const choice of choices) select.append(make("option", { value: String(choice) }, data.words[choice] || "(none)"));
    filters[field] = select;
    $("filters").append(make("label", { for: select.id }, field, select));
  }
  $("filters").append(make("button", { type: "reset" }, "Reset"));
  const searchable = rows.map((row) => (data.ids[row] + " " + Object.keys(data.fields).map((field) => word(field, row)).join(" ")).toLowerCase());

  const chosen = () => {
    const text = filters.text.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    const picked = words.filter((field) => filters[field] && filters[field].value !== "").map((field) => [data.fields[field], Number(filters[field].value)]);
    return rows.filter((row) => picked.every(([column, value]) => column[row] === value) && text.every((part) => searchable[row].includes(part)));
  };
  const sorted = (found) => {
    if (state.sort === null) return found;
    const values = data.values[state.sort];
    const key = values ? (row) => values[row] : (row) => (state.sort === "cell" ? data.ids[row] : data.order[data.fields[state.sort][row]]);
    const sign = state.down ? -1 : 1;
    return found.slice().sort((a, b) => {
      const x = key(a), y = key(b);
      if (!known(x) || !known(y)) return known(x) ? -1 : known(y) ? 1 : 0; // what is not there stands last
      return x < y ? -sign : x > y ? sign : 0;
    });
  };
  const head = make("tr");
  const header = (name, title, number) => {
    const button = make("button", { type: "button" }, title);
    const cell = make("th", { scope: "col", "aria-sort": "none", className: number ? "number" : "" }, button);
    cell.dataset.name = name;
    button.addEventListener("click", () => {
      state.down = state.sort === name ? !state.down : false;
      state.sort = name;
      for (const other of head.children) other.setAttribute("aria-sort", other === cell ? (state.down ? "descending" : "ascending") : "none");
      refresh();
    });
    return cell;
  };
  head.append(header("cell", "cell"), ...words.map((field) => header(field, field)), ...numbers.map((kind) => header(kind.name, kind.title, true)));
  $("table").tHead.append(head);
  const filled = (row) => {
    const open = make("button", { type: "button" }, data.ids[row]);
    open.addEventListener("click", () => detail(row));
    const line = make("tr", {}, make("td", {}, open));
    for (const field of words) line.append(make("td", { className: word(field, row) === "failed" ? "failed" : "" }, word(field, row)));
    for (const kind of numbers) {
      const cell = make("td", { className: "number" }, shown(data.values[kind.name][row], kind));
      const low = kind.low && data.values[kind.low][row], high = kind.high && data.values[kind.high][row];
      if (known(low) && kind.low) cell.append(" ", make("small", {}, `[${shown(low, kind)}, ${shown(high, kind)}]`));
      line.append(cell);
    }
    return line;
  };
  const refresh = () => {
    state.shown = sorted(chosen());
    const pages = Math.max(1, Math.ceil(state.shown.length / PAGE));
    state.page = Math.min(state.page, pages - 1);
    $("table").tBodies[0].replaceChildren(...state.shown.slice(state.page * PAGE, (state.page + 1) * PAGE).map(filled));
    $("count").textContent = `${state.shown.length} of ${data.n} rows`;
    $("page").textContent = `page ${state.page + 1} of ${pages}`;
    $("previous").disabled = state.page === 0;
    $("next").disabled = state.page >= pages - 1;
    draw();
  };
  const filtered = () => { state.page = 0; refresh(); };
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("filters").addEventListener("input", filtered);
  $("filters").addEventListener("reset", () => setTimeout(filtered));
  $("previous").addEventListener("click", () => { state.page -= 1; refresh(); });
  $("next").addEventListener("click", () => { state.page += 1; refresh(); });

  /* ---- one cell ---- */
  const P = (value) => (known(value) ? (value < 0.0001 ? "<0.0001" : value.toFixed(4)) : "–");
  const plain = { scale: 1, digits: 4 };
  const command = (text) => {
    const copy = make("button", { type: "button" }, "Copy");
    copy.addEventListener("click", () => {
      const area = make("textarea", { value: text });
      copy.after(area); area.select();
      try { document.execCommand("copy"); copy.textContent = "Copied"; } finally { area.remove(); copy.focus(); }
    });
    return make("div", { className: "command" }, make("pre", {}, text), copy);
  };
  const list = (pairs) => {
    const node = make("dl");
    for (const [name, value] of pairs) if (known(value) && value !== "") node.append(make("dt", {}, name), make("dd", {}, String(value)));
    return node;
  };
  const taskTable = (row) => {
    const table = make("table", { className: "numbers" });
    const names = ["task", "metric", "items", "value", "dense", "drop or ratio", "95 %", "lost", "gained", "changed", "McNemar p", "Holm p", "mean |Δ ll|", "KL", "top-1"];
    table.append(make("thead", {}, make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name)))));
    const body = make("tbody");
    for (const one of data.tasks[row]) {
      const [task, metric, items, value, dense, change, low, high, lost, gained, changed, p, holm, delta, kl, top1] = one;
      const kind = plain;
      const cells = [data.words[task], data.words[metric], String(items), shown(value, kind), shown(dense, kind), shown(change, kind), known(low) ? `[${shown(low, kind)}, ${shown(high, kind)}]` : "–", shown(lost, kind), shown(gained, kind), shown(changed, kind), P(p), P(holm), shown(delta, kind), shown(kl, kind), shown(top1, kind)];
      body.append(make("tr", {}, ...cells.map((text, place) => make("td", { className: place > 1 ? "number" : "" }, text))));
    }
    table.append(body);
    return make("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "Numbers by task" }, table);
  };
  const detail = (row) => {
    const cell = data.cell[row];
    $("detail-title").textContent = `${word("model", row)} ${word("pattern", row)} ${word("criterion", row)} ${word("mitigation", row)}`;
    const fields = [["cell", data.ids[row]], ...Object.keys(data.fields).map((field) => [field, word(field, row)])];
    const made = Object.entries(data.provenance).map(([name, column]) => [name, column.words ? data.words[column.words[cell]] : column.numbers[cell]]);
    const parts = [list(fields)];
    if (data.errors[cell]) parts.push(make("p", { className: "bad" }, data.errors[cell]));
    if (data.tasks[row].length) parts.push(make("h3", {}, "By task"), taskTable(row));
    if (data.tasks[row].length && word("pattern", row) !== "dense") parts.push(make("p", { className: "hint" }, `nmsweep inspect ${data.ids[row]} shows the items that changed between right and wrong.`));
    parts.push(make("h3", {}, "Run this cell again"), command(data.rerun[cell]), make("h3", {}, "Provenance"), list(made));
    $("detail-body").replaceChildren(...parts);
    $("detail").showModal();
  };
  $("close").addEventListener("click", () => $("detail").close());
  $("detail").addEventListener("click", (event) => { if (event.target === $("detail")) $("detail").close(); });

  /* ---- chart ---- */
  const LOOK = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C"];
  const shape = (number, x, y, r) => {
    const colour = LOOK[number % 7];
    const path = [
      () => svg("circle", { cx: x, cy: y, r }),
      () => svg("rect", { x: x - r, y: y - r, width: 2 * r, height: 2 * r }),
      () => svg("path", { d: `M${x} ${y - 1.3 * r}L${x + 1.3 * r} ${y}L${x} ${y + 1.3 * r}L${x - 1.3 * r} ${y}Z` }),
      () => svg("path", { d: `M${x} ${y - 1.2 * r}L${x + 1.2 * r} ${y + r}L${x - 1.2 * r} ${y + r}Z` }),
      () => svg("path", { d: `M${x} ${y + 1.2 * r}L${x + 1.2 * r} ${y - r}L${x - 1.2 * r} ${y - r}Z` }),
      () => svg("path", { d: `M${x - r} ${y - r}L${x + r} ${y + r}M${x - r} ${y + r}L${x + r} ${y - r}`, "stroke-width": 2 }),
      () => svg("path", { d: `M${x} ${y - 1.2 * r}V${y + 1.2 * r}M${x - 1.2 * r} ${y}H${x + 1.2 * r}`, "stroke-width": 2 }),
    ][number % 7]();
    path.setAttribute("fill", number % 7 > 4 ? "none" : colour);
    path.setAttribute("stroke", colour);
    return path;
  };
  const select = (id, title, options, value) => {
    const node = make("select", { id }, ...options.map(([key, text]) => make("option", { value: key }, text)));
    node.value = value;
    $("axes").append(make("label", { for: id }, title, node));
    node.addEventListener("input", () => draw());
    return node;
  };
  const quantities = numbers.map((kind) => [kind.name, kind.title]);
  const axisX = select("axis-x", "across", [["pattern", "pattern"], ...quantities], "pattern");
  const axisY = select("axis-y", "up", quantities, numbers.some((kind) => kind.name === "drop") ? "drop" : (quantities[0] || [""])[0]);
  const colour = select("axis-colour", "mark by", words.map((field) => [field, field]), words.includes("mitigation") ? "mitigation" : words[0]);
  const kindOf = (name) => numbers.find((kind) => kind.name === name);
  const W = 760, H = 400, LEFT = 60, BOTTOM = 50, TOP = 15, RIGHT = 15;
  let points = [], current = -1, root = null;

  const steps = (low, high) => {
    const rough = (high - low) / 5 || 1, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
    const found = [];
    for (let at = Math.ceil(low / step) * step; at <= high + 1e-9; at += step) found.push(Number(at.toPrecision(6)));
    return found;
  };
  const scale = (values, from, to) => {
    let low = Math.min(...values), high = Math.max(...values);
    const room = (high - low || Math.abs(high) || 1) * 0.05;
    low -= room; high += room;
    const at = (value) => from + ((value - low) / (high - low)) * (to - from);
    at.steps = steps(low, high);
    return at;
  };
  const draw = () => {
    const y = kindOf(axisY.value);
    points = []; current = -1;
    $("point").textContent = ""; $("legend").replaceChildren(); $("plot").replaceChildren();
    if (!y) return;
    const x = kindOf(axisX.value);
    const patterns = [...new Set(state.shown.map((row) => data.fields.pattern[row]))].sort((a, b) => data.order[a] - data.order[b]);
    const found = state.shown.filter((row) => known(data.values[y.name][row]) && (!x || known(data.values[x.name][row])));
    if (!found.length) { $("plot").append(make("p", { className: "hint" }, "No cell above has these numbers.")); return; }
    const marks = [...new Set(found.map((row) => data.fields[colour.value][row]))].sort((a, b) => data.order[a] - data.order[b]);
    const used = x ? [] : patterns.filter((pattern) => found.some((row) => data.fields.pattern[row] === pattern));
    const valueX = x ? (row) => data.values[x.name][row] * x.scale : (row) => used.indexOf(data.fields.pattern[row]) + (marks.length > 1 ? (0.5 * marks.indexOf(data.fields[colour.value][row])) / (marks.length - 1) - 0.25 : 0);
    const valueY = (row) => data.values[y.name][row] * y.scale;
    const ends = found.length <= 300 && y.low ? found.flatMap((row) => [data.values[y.low][row], data.values[y.high][row]]).filter(known).map((value) => value * y.scale) : [];
    const atX = scale(x ? found.map(valueX) : [-0.5, used.length - 0.5], LEFT, W - RIGHT);
    const atY = scale([...found.map(valueY), ...ends], H - BOTTOM, TOP);
    root = svg("svg", { viewBox: `0 0 ${W} ${H}`, tabindex: 0, role: "application", "aria-label": `${y.title} against ${x ? x.title : "pattern"}, ${found.length} points; arrow keys move, Enter opens` });
    for (const value of atY.steps) root.append(svg("line", { class: "grid", x1: LEFT, x2: W - RIGHT, y1: atY(value), y2: atY(value) }), svg("text", { x: LEFT - 6, y: atY(value) + 4, "text-anchor": "end" }, String(value)));
    if (x) for (const value of atX.steps) root.append(svg("text", { x: atX(value), y: H - BOTTOM + 18, "text-anchor": "middle" }, String(value)));
    else used.forEach((pattern, place) => root.append(svg("text", { x: atX(place), y: H - BOTTOM + 18, "text-anchor": "middle" }, data.words[pattern])));
    root.append(svg("text", { x: (W + LEFT) / 2, y: H - 8, "text-anchor": "middle" }, x ? x.title : "pattern"), svg("text", { x: 14, y: (H - BOTTOM) / 2, "text-anchor": "middle", transform: `rotate(-90 14 ${(H - BOTTOM) / 2})` }, y.title));
    const r = found.length > 1000 ? 2 : 4;
    points = found.map((row) => ({ row, x: atX(valueX(row)), y: atY(valueY(row)), mark: marks.indexOf(data.fields[colour.value][row]) }));
    for (const point of points) {
      const low = ends.length ? data.values[y.low][point.row] : null, high = ends.length ? data.values[y.high][point.row] : null;
      if (known(low)) root.append(svg("line", { class: "spread", stroke: LOOK[point.mark % 7], x1: point.x, x2: point.x, y1: atY(low * y.scale), y2: atY(high * y.scale) }));
      point.node = shape(point.mark, point.x, point.y, r);
      root.append(point.node);
    }
    points.sort((a, b) => a.x - b.x || a.y - b.y);
    root.addEventListener("pointermove", (event) => {
      const box = root.getBoundingClientRect(), px = ((event.clientX - box.left) * W) / box.width, py = ((event.clientY - box.top) * H) / box.height;
      let best = -1, near = 20 * 20;
      points.forEach((point, place) => { const d = (point.x - px) ** 2 + (point.y - py) ** 2; if (d < near) { near = d; best = place; } });
      if (best >= 0 && best !== current) show(best);
    });
    root.addEventListener("click", () => { if (current >= 0) detail(points[current].row); });
    root.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (move) { event.preventDefault(); show(current < 0 ? 0 : (current + move + points.length) % points.length); }
      else if (event.key === "Home") { event.preventDefault(); show(0); }
      else if (event.key === "End") { event.preventDefault(); show(points.length - 1); }
      else if (event.key === "Enter" && current >= 0) { event.preventDefault(); detail(points[current].row); }
    });
    $("plot").append(root);
    $("legend").append(...marks.slice(0, 30).map((mark, place) => make("span", {}, svg("svg", { viewBox: "0 0 14 14", "aria-hidden": "true" }, shape(place, 7, 7, 4)), data.words[mark] || "(none)")));
    if (marks.length > 7) $("legend").append(make("span", { className: "hint" }, "marks repeat after seven"));
  };
  const show = (place) => {
    if (current >= 0) points[current].node.classList.remove("current");
    current = place;
    const { node, row } = points[place], y = kindOf(axisY.value);
    node.classList.add("current");
    root.append(node);
    const low = y.low ? data.values[y.low][row] : null;
    const name = words.map((field) => word(field, row)).filter(Boolean).join(" · ");
    $("point").replaceChildren(make("strong", {}, name), `: ${y.title} ${shown(data.values[y.name][row], y)}${known(low) ? ` [${shown(low, y)}, ${shown(data.values[y.high][row], y)}]` : ""}; cell ${data.ids[row]}`, make("pre", {}, data.rerun[data.cell[row]]));
  };
  refresh();
})();
