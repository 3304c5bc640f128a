// Draws an entry: the stitching graph, values held, bytes. Text of the entry only becomes text nodes.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const make = (name, attributes = {}, ...inside) => {
  const found = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, value);
  found.append(...inside);
  return found;
};
const html = (name, ...inside) => { const found = document.createElement(name); found.append(...inside); return found; };
const sizeText = (n) => { let at = 0; while (n >= 1024 && at < 4) { n /= 1024; at++; } return `${at ? n.toFixed(1) : n} ${["B", "KiB", "MiB", "GiB", "TiB"][at]}`; };
const secondsText = (s) => (s < 1e-3 ? `${(s * 1e6).toFixed(0)} µs` : s < 1 ? `${(s * 1e3).toFixed(1)} ms` : `${s.toFixed(1)} s`);
const cut = (text, most) => (text.length > most ? text.slice(0, most - 1) + "…" : text);

// Pieces that are called more than once get a colour each, in order of their calls.
const shared = data.pieces.map((p, i) => [p.calls.length, i]).filter(([calls]) => calls > 1).sort((a, b) => b[0] - a[0]);
const colours = new Map(shared.slice(0, 8).map(([, index], rank) => [index, `var(--c${rank})`]));
const colourOf = (step) => (step.kind === "piece" ? colours.get(step.piece) ?? "var(--plain)" : "var(--bg)");

let shownVariant = 0, chosen = -1, view = { x: 0, y: 0, w: 100, h: 100 }, whole = view, nodes = new Map(), graphviz = null;
const variant = () => data.variants[shownVariant];
const steps = () => variant().steps;

// -- the graph: which steps share a node, and what leads from node to node

function folded() {
  const inputs = steps().filter((s) => s.kind === "input").length, fold = $("fold").checked;
  const node = steps().map((s, i) => (s.kind === "input" && inputs > 6 ? 0 : fold && s.fold ? s.fold[0] : i));
  const edges = new Map();
  steps().forEach((step, to) => step.reads.forEach(([from, name]) => {
    const key = `${node[from]} ${node[to]}`;
    if (!edges.has(key)) edges.set(key, { from: node[from], to: node[to], names: new Set() });
    edges.get(key).names.add(name);
    edges.get(key).most = Math.max(edges.get(key).most ?? 1, step.reads.filter(([other]) => node[other] === node[from]).length);
  }));
  return { node, edges: [...edges.values()], members: group(node) };
}

function group(node) {
  const found = new Map();
  node.forEach((to, from) => found.set(to, [...(found.get(to) ?? []), from]));
  return found;
}

// In a graph of many steps, an arrow over many of them (a mask that each layer reads) would cross everything and
// take Graphviz minutes: the reader names where the value comes from, and its arrow is drawn when a step is chosen.
const FAR = 12;

function labels(at, members) {
  const step = steps()[at], times = members.length > 1 ? ` ×${members.length}` : "";
  if (step.kind === "input") return [members.length > 1 ? `${members.length} inputs` : step.name, members.length > 1 ? "" : "input"];
  if (step.kind === "output") return ["result", ""];
  if (step.kind === "op") return [step.name.replace(/^torch\.ops\./, "").replace(/\.default$/, ""), `op${times}`];
  const piece = data.pieces[step.piece];
  return [step.name, piece ? `piece ${piece.letter}${times} · ${sizeText(piece.bytes)}` : `submodule${times}`];
}

function place(boxes, edges) {
  const inch = (n) => (n / 72).toFixed(3);
  const dot = ["digraph { ranksep=0.32; nodesep=0.3; node [shape=box fixedsize=true]"];
  for (const [at, box] of boxes) dot.push(`n${at} [width=${inch(box.w)} height=${inch(box.h)}]`);
  for (const e of edges) if (!e.far) dot.push(`n${e.from} -> n${e.to}${e.to <= e.from ? " [constraint=false]" : ""}`);
  const lines = graphviz.layout(dot.join("\n") + "}", "plain", "dot").replace(/\\\n/g, "").split("\n").map((l) => l.split(" "));
  const height = Number(lines[0][3]) * 72;
  for (const l of lines) {
    if (l[0] === "node") Object.assign(boxes.get(Number(l[1].slice(1))), { x: l[2] * 72, y: height - l[3] * 72 });
  }
  const paths = new Map();
  for (const l of lines.filter((l) => l[0] === "edge")) {
    const points = [];
    for (let i = 0; i < Number(l[3]); i++) points.push([l[4 + 2 * i] * 72, height - l[5 + 2 * i] * 72]);
    paths.set(`${l[1]} ${l[2]}`, points);
  }
  return paths;
}

function placeInColumn(boxes) {
  // Where WebAssembly is off: below each other, in the order in which they run.
  let y = 0;
  for (const box of boxes.values()) { Object.assign(box, { x: 150, y: y + box.h / 2 }); y += box.h + 28; }
  return new Map();
}

function draw() {
  const { edges, members } = folded(), boxes = new Map();
  for (const [at, those] of [...members].sort((a, b) => a[0] - b[0])) {
    const text = labels(at, those).map((t) => cut(t, 44));
    boxes.set(at, { text, those, w: 24 + 7.4 * Math.max(...text.map((t) => t.length)), h: text[1] ? 40 : 28 });
  }
  for (const e of edges) e.far = boxes.size > 3 * FAR && e.to - e.from > FAR;
  let paths = new Map();
  try { paths = graphviz && boxes.size < 1500 ? place(boxes, edges) : placeInColumn(boxes); } catch (error) { paths = placeInColumn(boxes); }
  const inside = [];
  for (const e of edges) {
    const a = boxes.get(e.from), b = boxes.get(e.to);
    if (!paths.size && e.to <= e.from) continue;
    if (e.far) b.from = [...(b.from ?? []), labels(e.from, [e.from])[0]];
    const points = paths.get(`n${e.from} n${e.to}`) ?? [[a.x, a.y + a.h / 2], [a.x, a.y + a.h / 2 + 9], [b.x, b.y - b.h / 2 - 9], [b.x, b.y - b.h / 2 - 6]];
    const [head, ...rest] = points, end = points[points.length - 1], near = points[points.length - 2];
    const line = make("path", { class: `edge${e.to <= e.from ? " back" : e.far ? " far" : ""}`, d: `M${head} C${rest.join(" ")}` }, make("title", {}, [...e.names].join(", ")));
    line.dataset.from = e.from; line.dataset.to = e.to;
    const turn = Math.atan2(end[1] - near[1], end[0] - near[0]) * 180 / Math.PI;
    inside.push(line);
    if (e.far) continue;
    inside.push(make("path", { class: "tip", d: "M7,0 L-1,-4 L-1,4 Z", transform: `translate(${end}) rotate(${turn})` }));
    if (e.most > 1) { const mid = points[Math.floor(points.length / 2)]; inside.push(make("text", { class: "count", x: mid[0] + 4, y: mid[1] }, String(e.most))); }
  }
  nodes = new Map();
  for (const [at, box] of boxes) {
    const step = steps()[at], kind = step.kind === "piece" ? 4 : box.h / 2;
    const node = make("g", { class: "node", tabindex: 0, role: "button", transform: `translate(${box.x - box.w / 2} ${box.y - box.h / 2})` },
      make("rect", { width: box.w, height: box.h, rx: kind }), make("text", { x: box.w / 2, y: box.text[1] ? 17 : 18, "text-anchor": "middle" }, box.text[0]));
    node.firstChild.style.fill = colourOf(step);
    if (box.text[1]) node.append(make("text", { class: "second", x: box.w / 2, y: 32, "text-anchor": "middle" }, box.text[1]));
    if (box.from) inside.push(make("text", { class: "count", x: box.x + box.w / 2 + 6, y: box.y + 4 }, `← ${cut(box.from.join(", "), 40)}`));
    node.addEventListener("click", () => go(at));
    inside.push(node);
    for (const member of box.those) nodes.set(member, node);
  }
  $("drawing").replaceChildren(...inside);
  const xs = [...boxes.values()];
  whole = { x: Math.min(...xs.map((b) => b.x - b.w / 2)) - 20, y: -20, w: 0, h: Math.max(...xs.map((b) => b.y + b.h / 2)) + 40 };
  whole.w = Math.max(...xs.map((b) => b.x + b.w / 2)) + 40 - whole.x;
  begin(xs[0].x);
  mark();
}

// -- pan and zoom

function look(next) { view = next; $("drawing").setAttribute("viewBox", `${view.x} ${view.y} ${view.w} ${view.h}`); }
function fit() { look({ ...whole }); }
function begin(top) {
  // At most a bit larger than life, and readable: a long graph begins at its top.
  const box = $("drawing").getBoundingClientRect(), scale = Math.min(1.3, Math.max(0.75, Math.min(box.width / whole.w, box.height / whole.h)));
  const w = box.width / scale, h = box.height / scale;
  look({ x: w > whole.w ? whole.x + (whole.w - w) / 2 : top - w / 2, y: h > whole.h ? whole.y + (whole.h - h) / 2 : whole.y, w, h });
}
function zoom(by, cx = 0.5, cy = 0.5) {
  const w = Math.min(Math.max(view.w / by, 60), whole.w * 8 + 4000), h = view.h * (w / view.w);
  look({ x: view.x + (view.w - w) * cx, y: view.y + (view.h - h) * cy, w, h });
}
function reveal(node) {
  const [x, y] = node.getAttribute("transform").match(/-?[\d.]+(?:e-?\d+)?/g).map(Number), rect = node.firstChild;
  const w = Number(rect.getAttribute("width")), h = Number(rect.getAttribute("height"));
  if (x < view.x || y < view.y || x + w > view.x + view.w || y + h > view.y + view.h) look({ ...view, x: x + w / 2 - view.w / 2, y: y + h / 2 - view.h / 2 });
}
$("drawing").addEventListener("wheel", (event) => {
  if (!event.ctrlKey && !event.metaKey && document.activeElement !== $("drawing") && !$("drawing").contains(document.activeElement)) return;
  event.preventDefault();
  const box = $("drawing").getBoundingClientRect();
  zoom(Math.exp(-event.deltaY / 400), (event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
}, { passive: false });
let grip = null;
$("drawing").addEventListener("pointerdown", (event) => { grip = [event.clientX, event.clientY]; });
window.addEventListener("pointermove", (event) => {
  if (!grip || !event.buttons) { grip = null; return; }
  const scale = view.w / $("drawing").getBoundingClientRect().width;
  look({ ...view, x: view.x - (event.clientX - grip[0]) * scale, y: view.y - (event.clientY - grip[1]) * scale });
  grip = [event.clientX, event.clientY];
});
window.addEventListener("pointerup", () => { grip = null; });
$("drawing").addEventListener("keydown", (event) => {
  const on = [...new Set(nodes.values())], at = on.indexOf(document.activeElement), pan = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "+" || event.key === "=") zoom(1.25);
  else if (event.key === "-") zoom(0.8);
  else if (event.key === "0") fit();
  else if (pan && at >= 0) { const next = on[at + pan[0] + pan[1]]; if (next) { next.focus({ preventScroll: true }); reveal(next); } }
  else if (pan) look({ ...view, x: view.x + pan[0] * view.w / 8, y: view.y + pan[1] * view.h / 8 });
  else if ((event.key === "Enter" || event.key === " ") && at >= 0) document.activeElement.dispatchEvent(new MouseEvent("click"));
  else return;
  event.preventDefault();
});
$("in").addEventListener("click", () => zoom(1.25));
$("out").addEventListener("click", () => zoom(0.8));
$("fit").addEventListener("click", fit);
$("fold").addEventListener("change", draw);

// -- the step that is chosen: its address is in the page's, so that the code and the way back lead there

function go(at) { const to = `#v${shownVariant}s${at}`; if (location.hash === to) select(); else location.hash = to; }
function select() {
  const found = /^#v(\d+)(?:s|L)(\d+)$/.exec(location.hash);
  if (!found || !data.variants[found[1]]) return;
  if (Number(found[1]) !== shownVariant) { shownVariant = Number(found[1]); $("variant").value = shownVariant; chosen = -1; all(); }
  if (location.hash.includes("L")) return;
  chosen = Number(found[2]);
  if (!steps()[chosen]) { chosen = -1; return; }
  mark(); tell();
  if (nodes.get(chosen)) reveal(nodes.get(chosen));
  if (document.activeElement?.classList.contains("line")) { nodes.get(chosen).focus(); $("graph").scrollIntoView(); }
}
function mark() {
  for (const node of document.querySelectorAll(".chosen")) node.classList.remove("chosen");
  for (const edge of document.querySelectorAll(".edge")) edge.classList.remove("lit");
  if (chosen < 0) return;
  nodes.get(chosen)?.classList.add("chosen");
  $("held").querySelector(`[data-step="${chosen}"]`)?.classList.add("chosen");
  const here = folded().node[chosen], [first, last] = steps()[chosen].lines;
  for (const edge of document.querySelectorAll(".edge")) if (Number(edge.dataset.from) === here || Number(edge.dataset.to) === here) edge.classList.add("lit");
  for (let line = first; line <= last; line++) $(`v${shownVariant}L${line}`)?.classList.add("chosen");
}
function link(at, text) { const found = html("a", text); found.href = `#v${shownVariant}s${at}`; return found; }
function list(title, items) { return items.length ? [html("h4", `${title} (${items.length})`), html("ul", ...items.map((item) => html("li", ...[item].flat())))] : []; }
function tell() {
  const step = steps()[chosen], piece = data.pieces[step.piece], name = step.kind === "output" ? "Result" : step.name;
  const users = steps().flatMap((s, i) => s.reads.filter(([from]) => from === chosen).map(([, value]) => [link(i, s.kind === "output" ? "result" : s.name), ` reads ${value}`]));
  const alike = steps().flatMap((s, i) => (i !== chosen && step.piece >= 0 && s.piece === step.piece ? [link(i, s.name)] : []));
  const code = html("a", `line ${step.lines[0]} of the code`);
  code.href = `#v${shownVariant}L${step.lines[0]}`;
  const bytes = weightBytes(step);
  const facts = [`Step ${chosen + 1} of ${steps().length} · ${step.kind} · ${heldBytes().counts[chosen]} values held`];
  if (piece) facts.push(`Piece ${piece.letter}: ${piece.backend}, ${sizeText(piece.bytes)} on disk, called ${piece.calls.length}×, key ${piece.key.slice(0, 12)}`);
  const timed = data.profile?.pieces.find((p) => p.key === piece?.key);
  if (timed) facts.push(`Takes ${secondsText(timed.seconds / timed.calls)}, ${(100 * timed.share / timed.calls).toFixed(0)} % of a call`);
  $("detail").replaceChildren(html("h3", name), ...facts.map((f) => html("p", f)), html("p", code),
    ...list("Reads", step.reads.map(([from, value]) => [`${value} from `, link(from, steps()[from].name)])),
    ...list(step.said ? `Makes ${step.said}` : "Makes", step.makes), ...list("Used by", users),
    ...list(`Weights, ${sizeText(bytes)}`, step.weights.map((w) => `${w}: ${data.weights[w] ?? ""}`)),
    ...list(piece?.backend === "eager" ? "Ops" : "Kernels", (piece?.ops ?? []).map(([op, times]) => (times > 1 ? `${op} ×${times}` : op))),
    ...list("The same piece", alike));
}
window.addEventListener("hashchange", select);

// -- charts

const JOINTS = { "+": (a, b) => a + b, "-": (a, b) => a - b, "*": (a, b) => a * b, "//": (a, b) => Math.floor(a / b), "%": (a, b) => a - b * Math.floor(a / b), "**": (a, b) => a ** b, max: Math.max, min: Math.min };
const RANK = { "+": 1, "-": 1, "*": 2, "//": 2, "%": 2, "**": 3 };
// Numbers that a text such as "s0, (2 * s1), max(s0, 3)" stands for; NaN for what is no arithmetic of sizes.
function computed(text, sizes) {
  const words = text.match(/\d+|[A-Za-z_]\w*|\*\*|\/\/|\S/g) ?? [];
  let at = 0;
  const list = () => { const found = [sum(1)]; while (words[at] === ",") { at++; found.push(sum(1)); } return found; };
  const one = () => {
    const word = words[at++], call = { max: Math.max, min: Math.min }[word];
    if (word === "(" || (call && words[at] === "(")) { if (call) at++; const inside = list(); at++; return (call ?? Number)(...inside); }
    return /^\d/.test(word) ? Number(word) : sizes.get(word) ?? NaN;
  };
  const sum = (rank) => { let left = one(); while (RANK[words[at]] >= rank) { const joint = words[at++]; left = JOINTS[joint](left, sum(RANK[joint] + 1)); } return left; };
  try { return words.length ? list() : []; } catch (error) { return [NaN]; }
}
// Bytes of the values that a comment such as "3 x float32[s0, 64], ?" tells of.
function bytesSaid(said, sizes) {
  const found = [];
  for (const [, times, dtype, shape] of said.matchAll(/(?:(\d{1,3}) x )?(?:(\w+)\[([^\]]*)\]|int|\?)/g)) {
    const item = Math.max(1, (/\d+/.exec(dtype ?? "")?.[0] ?? 8) / 8), bytes = dtype ? computed(shape, sizes).reduce((a, b) => a * b, item) : NaN;
    for (let n = 0; n < Number(times ?? 1); n++) found.push(bytes);
  }
  return found;
}
const weightBytes = (step) => step.weights.reduce((sum, w) => sum + (bytesSaid(data.weights[w] ?? "", new Map())[0] || 0), 0);
// What the code holds while each step runs, at the sizes that were chosen; values of unknown size count nothing.
function heldBytes() {
  const sizes = new Map([...$("sizes").querySelectorAll("input")].map((box) => [box.dataset.symbol, Number(box.value)])), held = new Map();
  let unknown = 0;
  const counts = [], at = steps().map((step) => {
    const bytes = bytesSaid(step.said, sizes);
    step.makes.forEach((name, i) => { if (!(bytes[i] >= 0)) unknown++; held.set(name, bytes[i] >= 0 ? bytes[i] : 0); });
    counts.push(held.size);
    const sum = [...held.values()].reduce((a, b) => a + b, 0);
    for (const name of step.frees) held.delete(name);
    return sum;
  });
  return { at, counts, unknown };
}
function sizeBoxes() {
  $("sizes").replaceChildren(...data.symbols.map(([name, label, min, max]) => {
    const box = html("input");
    Object.assign(box, { type: "number", min, max: max ?? "", value: max ?? Math.max(min, 16) });
    box.dataset.symbol = name;
    box.addEventListener("input", drawHeld);
    return html("label", `${label ? `${label} (${name})` : name} `, box);
  }));
}

function drawHeld() {
  // Entries of older formats say nothing of the sizes of results: there values are counted.
  const bytes = heldBytes(), known = steps().some((s) => s.kind !== "input" && s.said), held = known ? bytes.at : bytes.counts;
  const text = (n) => (known ? sizeText(n) : `${n} values`);
  $("sizes").hidden = !known;
  $("heldtitle").textContent = known ? "Memory at each step" : "Values held at each step";
  $("unknown").textContent = !known ? "This entry does not say how large results are, so values are counted." : `At most ${sizeText(Math.max(0, ...held))}.${bytes.unknown ? ` ${bytes.unknown} values are of unknown size.` : ""}`;
  const most = Math.max(1, ...held), width = 1000 / Math.max(1, steps().length), chart = $("held");
  chart.setAttribute("viewBox", "0 0 1000 110");
  chart.setAttribute("preserveAspectRatio", "none");
  chart.setAttribute("aria-label", `${$("heldtitle").textContent}, of ${steps().length} steps: at most ${text(most)}`);
  chart.replaceChildren(...steps().map((s, i) => {
    const height = 2 + 104 * held[i] / most, bar = make("rect", { x: i * width, y: 108 - height, width: Math.max(0.5, width - (width > 3 ? 1 : 0)), height, "data-step": i }, make("title", {}, `${i + 1}. ${s.name}: ${text(held[i])}`));
    bar.style.fill = s.kind === "piece" ? colours.get(s.piece) ?? "var(--soft)" : "var(--line)";
    bar.addEventListener("click", () => go(i));
    return bar;
  }));
}

// Squarified: a row takes items as long as its worst shape gets better.
function treemap(svg, items) {
  let [x, y, w, h] = [0, 0, svg.clientWidth || 1000, 220];
  svg.setAttribute("viewBox", `0 0 ${w} ${h}`);
  let rest = items.filter((i) => i.bytes > 0).sort((a, b) => b.bytes - a.bytes), left = rest.reduce((s, i) => s + i.bytes, 0), inside = [];
  svg.setAttribute("aria-label", `${svg.getAttribute("aria-label").split(":")[0]}: ${rest.slice(0, 8).map((i) => `${i.label} ${sizeText(i.bytes)}`).join(", ") || "nothing"}`);
  while (rest.length) {
    const area = w * h / left, side = Math.min(w, h);
    let row = 1, sum = rest[0].bytes, worst = Infinity;
    for (let n = 1, total = 0; n <= rest.length; n++) {
      total += rest[n - 1].bytes;
      const depth = total * area / side, now = Math.max(depth / (rest[n - 1].bytes * area / depth), (rest[0].bytes * area / depth) / depth);
      if (now > worst) break;
      worst = now; row = n; sum = total;
    }
    const depth = sum * area / side, down = w >= h;
    let along = 0;
    for (const item of rest.slice(0, row)) {
      const length = item.bytes * area / depth, [bx, by, bw, bh] = down ? [x, y + along, depth, length] : [x + along, y, length, depth];
      along += length;
      const box = make("rect", { x: bx, y: by, width: bw, height: bh }, make("title", {}, `${item.label}: ${sizeText(item.bytes)}`));
      box.style.fill = item.colour;
      inside.push(box);
      const room = Math.floor((bw - 10) / 7.4);
      if (room > 3 && bh > 18) inside.push(make("text", { x: bx + 6, y: by + 16 }, cut(item.label, room)));
      if (room > 7 && bh > 34) inside.push(make("text", { class: "second", x: bx + 6, y: by + 30 }, sizeText(item.bytes)));
    }
    left -= sum; rest = rest.slice(row);
    if (down) { x += depth; w -= depth; } else { y += depth; h -= depth; }
  }
  svg.replaceChildren(...inside);
}
function maps() {
  treemap($("disk"), data.disk.map(([label, bytes, piece]) => ({ label, bytes, colour: colours.get(piece) ?? "var(--plain)" })));
  treemap($("weights"), steps().map((s) => ({ label: s.name, bytes: weightBytes(s), colour: colourOf(s) })));
}

// Bars one after the other, each on a line of its own: what is left of the whole comes last.
function timeline(svg, parts, total, rest) {
  const left = total - parts.reduce((sum, [, s]) => sum + s, 0);
  let begin = 0;
  svg.setAttribute("viewBox", `0 0 900 ${20 * parts.length + 20}`);
  svg.setAttribute("aria-label", parts.map(([name, s]) => `${name} ${secondsText(s)}`).join(", "));
  svg.replaceChildren(...[...parts, [rest, Math.max(0, left)]].flatMap(([name, s], i) => {
    const x = 150 + 600 * begin / total, y = 20 * i;
    begin += s;
    return [make("text", { x: 0, y: y + 14 }, cut(name, 20)), make("rect", { x, y: y + 2, width: Math.max(1, 600 * s / total), height: 15 }),
      make("text", { x: 765, y: y + 14 }, `${secondsText(s)} (${(100 * s / total).toFixed(0)}%)`)];
  }));
}
function times() {
  const stages = Object.entries(data.last.stages).filter(([name]) => name !== "total"), profile = data.profile;
  if (stages.length) {
    const total = Math.max(data.last.stages.total ?? 0, stages.reduce((sum, [, s]) => sum + s, 0)) || 1;
    $("laststart").hidden = false;
    $("lastsaid").textContent = `${secondsText(total)} in all, on ${data.last.said}`;
    timeline($("stages"), stages, total, "other");
  }
  if (profile) {
    const sizes = Object.entries(profile.sizes).map(([name, n]) => `${name}=${n}`).join(", "), letter = (key) => data.pieces.find((p) => p.key === key)?.letter ?? "";
    $("profiled").hidden = false;
    $("profilesaid").textContent = `${secondsText(profile.seconds)} a call on ${profile.device}, made-up inputs (${sizes || "no size varies"}). What a compiler fused for a CPU is not among the ops.`;
    timeline($("pieces"), profile.pieces.map((p) => [`piece ${letter(p.key)} ×${p.calls}`, p.seconds]), profile.seconds, "between pieces");
    $("ops").replaceChildren(...profile.ops.map((row) => html("tr", ...[row.op, letter(row.piece), String(row.calls), secondsText(row.seconds)].map((cell) => html("td", cell)))));
  }
}

function all() {
  $("said").textContent = variant().problem;
  $("foldbox").hidden = !steps().some((s) => s.fold);
  if (steps().length) { drawHeld(); draw(); maps(); }
}
data.variants.forEach((v, i) => { const one = html("option", v.title); one.value = i; $("variant").append(one); });
$("pick").hidden = data.variants.length < 2;
$("variant").addEventListener("change", () => { shownVariant = Number($("variant").value); chosen = -1; all(); });
window.addEventListener("resize", maps);
$("tools").hidden = false;
sizeBoxes();
times();
try { graphviz = await globalThis.Graphviz.load(); } catch (error) { $("said").textContent = "Graphviz cannot run here; the steps stand below each other."; }
all();
select();
document.documentElement.dataset.drawn = Math.round(performance.now());
