"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const SIDES = ["chosen", "rejected"];
const BOX = { left: 60, right: 790, top: 10, bottom: 205 };
let shown; // curves and shaping of the pair and signal that are picked, by side

function numbers(packed) {
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
}

function brief(number) {
  if (number === 0) return "0";
  const size = Math.abs(number);
  const text = size < 1e-3 || size >= 1e5 ? size.toExponential(2) : Number(size.toPrecision(4)).toString();
  return (number < 0 ? "−" : "") + text;
}

const signed = (number) => (number > 0 ? "+" : "") + brief(number);

function element(name, attributes, parent, svg = true) {
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  parent.append(made);
  return made;
}

function cell(row, text, name = "td") {
  element(name, {}, row, false).textContent = text;
}

function show() {
  const pair = data.pairs[at("pair").selectedIndex];
  const index = at("signal").selectedIndex;
  const signal = data.signals[index];
  shown = SIDES.map((side, i) => {
    const curve = numbers(pair.curves[index][i]);
    const steps = curve.slice(1).map((after, t) => signal.gamma * after - signal.leaving * curve[t]);
    return { side, curve, steps, tokens: pair.tokens[i], sum: steps.reduce((sum, one) => sum + one, 0) };
  });
  const [chosen, rejected] = shown.map((one) => one.sum);
  const ranks = chosen === rejected ? "ranks neither first"
    : `ranks the ${chosen > rejected ? "chosen" : "rejected"} response first`;
  at("summary").textContent = `Row ${pair.row}: ${signal.name} gives the chosen response ${signed(chosen)} and the ` +
    `rejected one ${signed(rejected)}: it ${ranks}.` +
    (pair.student === null ? "" : ` beta times the student's log-prob gap: ${signed(pair.student)}.`);
  at("prompt").textContent = pair.prompt;
  at("scale").textContent = brief(signal.scale);
  at("curve-name").textContent = signal.name;
  at("token").textContent = "Point at a token, or use the arrow keys in a response, to see its numbers.";
  for (const one of shown) showTokens(one, signal.scale);
  showCurves(signal.name);
  showTable();
}

function showTokens(one, scale) {
  const box = at(one.side);
  box.replaceChildren(...one.tokens.map((text, t) => {
    const made = document.createElement("span");
    const strength = Math.min(Math.abs(one.steps[t]) / scale, 1);
    const colour = one.steps[t] < 0 ? "--down" : "--up";
    made.style.background = `color-mix(in srgb, var(${colour}) ${Math.round(55 * strength)}%, transparent)`;
    made.dataset.token = t;
    made.textContent = text.replaceAll("\n", "↵\n") || "·";
    if (!text) made.className = "nothing";
    return made;
  }));
  box.scrollTop = 0;
  delete box.dataset.current;
}

function point(one, t) {
  const box = at(one.side);
  for (const old of document.querySelectorAll(".tokens .current")) old.classList.remove("current");
  box.children[t].classList.add("current");
  box.dataset.current = t;
  at("token").textContent = `${one.side}, token ${t + 1} of ${one.tokens.length}, ${JSON.stringify(one.tokens[t])}: ` +
    `shaping ${signed(one.steps[t])}, from ${brief(one.curve[t])} to ${brief(one.curve[t + 1])}`;
  const x = place(t + 1);
  const cursor = at("cursor") || element("line", { id: "cursor", class: "half", y1: BOX.top, y2: BOX.bottom }, at("curve"));
  cursor.setAttribute("x1", x);
  cursor.setAttribute("x2", x);
}

const longest = () => Math.max(...shown.map((one) => one.curve.length - 1));
const place = (t) => BOX.left + (BOX.right - BOX.left) * t / longest();

function ticks(low, high) {
  const rough = (high - low) / 6;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= rough);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(i * step);
  return found;
}

function showCurves(name) {
  const svg = at("curve");
  svg.replaceChildren();
  const all = shown.flatMap((one) => one.curve);
  let low = all.reduce((a, b) => Math.min(a, b)), high = all.reduce((a, b) => Math.max(a, b));
  if (low === high) { low -= 1; high += 1; }
  const y = (value) => BOX.bottom - (BOX.bottom - BOX.top) * (value - low) / (high - low);
  for (const tick of ticks(low, high)) {
    element("line", { class: "axis", x1: BOX.left, x2: BOX.right, y1: y(tick), y2: y(tick) }, svg);
    element("text", { x: BOX.left - 6, y: y(tick) + 4, "text-anchor": "end" }, svg).textContent = brief(Number(tick.toPrecision(6)));
  }
  for (const tick of ticks(0, longest()).filter(Number.isInteger)) {
    element("text", { x: place(tick), y: BOX.bottom + 24, "text-anchor": "middle" }, svg).textContent = tick;
  }
  for (const one of shown) {
    const points = one.curve.map((value, t) => `${place(t).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
    element("polyline", { class: one.side, points }, svg);
  }
  const said = shown.map((one) => `${one.side} from ${brief(one.curve[0])} to ${brief(one.curve.at(-1))}`);
  svg.setAttribute("aria-label", `${name} over the tokens of both responses: ${said.join(", ")}.`);
}

function showTable() {
  const box = at("token-numbers");
  box.replaceChildren();
  if (!at("table").open) return;
  for (const one of shown) {
    const table = element("table", {}, box, false);
    element("caption", {}, table, false).textContent = one.side;
    const head = element("tr", {}, element("thead", {}, table, false), false);
    for (const text of ["token", "shaping", "before", "after"]) cell(head, text, "th");
    const body = element("tbody", {}, table, false);
    one.tokens.forEach((text, t) => {
      const row = element("tr", {}, body, false);
      cell(row, JSON.stringify(text));
      for (const number of [one.steps[t], one.curve[t], one.curve[t + 1]]) cell(row, brief(number));
    });
  }
}

function turn(by) {
  const select = at("pair");
  select.selectedIndex = (select.selectedIndex + by + data.pairs.length) % data.pairs.length;
  show();
}

for (const pair of data.pairs) {
  const start = pair.prompt.trim().replace(/\s+/g, " ");
  const end = start.length > 90 ? "…" + start.slice(-90) : start;
  at("pair").append(new Option(`row ${pair.row}: ${end}`));
}
for (const signal of data.signals) at("signal").append(new Option(signal.name));
at("pair").addEventListener("change", show);
at("signal").addEventListener("change", show);
at("previous").addEventListener("click", () => turn(-1));
at("next").addEventListener("click", () => turn(1));
at("table").addEventListener("toggle", showTable);
SIDES.forEach((side, i) => {
  const box = at(side);
  const target = (event) => event.target.dataset && event.target.dataset.token;
  for (const kind of ["mouseover", "click"]) {
    box.addEventListener(kind, (event) => {
      if (target(event) !== undefined) point(shown[i], Number(target(event)));
    });
  }
  box.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    const now = box.dataset.current === undefined ? -1 : Number(box.dataset.current);
    const next = Math.min(Math.max(now + by, 0), shown[i].tokens.length - 1);
    point(shown[i], next);
    box.children[next].scrollIntoView({ block: "nearest" });
  });
});
show();
