// Every head over training: a slider moves maps through the probes, a head that is chosen has its curve beside them.
// All timelines of a page show the same step and the same head.
const shown = {step: Infinity, layer: 0, head: 0};
const timelines = [];
const VIRIDIS = [[68, 1, 84], [71, 45, 123], [59, 82, 139], [44, 114, 142], [33, 145, 140], [40, 174, 128],
  [94, 201, 98], [173, 220, 48], [253, 231, 37]];
const [LEFT, TOP, WIDE, HIGH, BELOW] = [44, 30, 350, 230, 36]; // of a panel: margins, and what is drawn in

function shape(parent, name, attributes = {}, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.textContent = text;
  return parent.appendChild(made);
}

function colour(share) {
  const place = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1);
  const low = Math.min(Math.floor(place), VIRIDIS.length - 2);
  return `rgb(${VIRIDIS[low].map((value, i) => Math.round(value + (place - low) * (VIRIDIS[low + 1][i] - value)))})`;
}

function panel(place, label) {
  const box = `0 0 ${LEFT + WIDE + 6} ${TOP + HIGH + BELOW}`;
  return shape(place, "svg", {viewBox: box, role: "group", "aria-label": label});
}

// Labels of an axis, twelve at most: `at` tells where each number stands.
function ticks(svg, count, at, down) {
  for (let i = 0; i < count; i += Math.ceil(count / 12)) {
    shape(svg, "text", down ? {x: LEFT - 5, y: at(i) + 4, "text-anchor": "end"}
      : {x: at(i), y: TOP + HIGH + 14, "text-anchor": "middle"}, i);
  }
}

function names(svg, across, down) {
  shape(svg, "text", {x: LEFT + WIDE / 2, y: TOP + HIGH + 31, "text-anchor": "middle"}, across);
  shape(svg, "text", {transform: `translate(12 ${TOP + HIGH / 2}) rotate(-90)`, "text-anchor": "middle"}, down);
}

const nats = value => value === null ? "not finite" : `${(value / 100).toFixed(2)} nats`;
const unpacked = layer => layer.match(/../g).map(pair => pair === "--" ? null : parseInt(pair, 36));
const show = change => { Object.assign(shown, change); for (const draw of timelines) draw(); };

const nameOf = (data, layer) => data.layers?.[layer] ?? `layer ${layer}`;

// The map of one variant; returns what draws it anew.
function map(place, data, variant, top) {
  const svg = panel(place, `${variant.name}: every head`);
  const sizes = variant.probes.find(Boolean).map(layer => layer.length);
  const [width, height] = [WIDE / Math.max(...sizes), HIGH / sizes.length];
  shape(svg, "line", {x1: LEFT, x2: LEFT + 26, y1: 14, y2: 14, stroke: variant.colour, "stroke-width": 2,
    "stroke-dasharray": variant.dash});
  const title = shape(svg, "text", {x: LEFT + 32, y: 18, class: "name"});
  ticks(svg, sizes.length, i => TOP + (i + 0.5) * height, true);
  ticks(svg, Math.max(...sizes), i => LEFT + (i + 0.5) * width, false);
  names(svg, "head", "layer");
  const cells = sizes.map((heads, layer) => Array.from({length: heads}, (_, head) => {
    const cell = shape(svg, "rect", {x: LEFT + head * width, y: TOP + layer * height, width, height, role: "button"});
    for (const event of ["click", "focus"]) cell.addEventListener(event, () => show({layer, head}));
    shape(cell, "title");
    return cell;
  }));
  const frame = shape(svg, "rect", {class: "frame", width, height});
  svg.addEventListener("keydown", event => {
    const [down, right] = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key] ?? [];
    if (down === undefined) return;
    event.preventDefault();
    cells[shown.layer + down]?.[shown.head + right]?.focus();
  });
  return index => {
    const values = variant.probes[index];
    title.textContent = values ? variant.name : `${variant.name}: not probed at this step`;
    cells.forEach((row, layer) => row.forEach((cell, head) => {
      const value = values?.[layer][head] ?? null, chosen = layer === shown.layer && head === shown.head;
      cell.setAttribute("fill", value === null ? "#ddd" : colour(value / top));
      cell.setAttribute("tabindex", chosen ? 0 : -1);
      cell.setAttribute("aria-pressed", chosen);
      cell.firstChild.textContent = `${nameOf(data, layer)}, head ${head}: ${values ? nats(value) : "not probed at this step"}`;
    }));
    frame.setAttribute("x", LEFT + shown.head * width);
    frame.setAttribute("y", TOP + shown.layer * height);
    frame.style.display = cells[shown.layer]?.[shown.head] ? "" : "none";
  };
}

// The chosen head of every variant over training; returns what draws it anew.
function curves(place, data, top) {
  const svg = panel(place, "Entropy of the chosen head over training");
  const last = data.steps.at(-1) || 1;
  const [x, y] = [step => LEFT + WIDE * step / last, value => TOP + HIGH * (1 - value / (1.05 * top))];
  const title = shape(svg, "text", {x: LEFT, y: 18, class: "name"});
  shape(svg, "path", {class: "axis", d: `M${LEFT} ${TOP}V${TOP + HIGH}H${LEFT + WIDE}`});
  const unit = [1, 2, 5, 10, 20, 50, 100].find(each => top / 100 <= 8 * each / 10) / 10;
  for (let at = 0; at <= top / 100; at += unit) {
    shape(svg, "text", {x: LEFT - 5, y: y(100 * at) + 4, "text-anchor": "end"}, +at.toFixed(1));
  }
  for (const [step, anchor] of [[0, "middle"], [last, "end"]]) {
    shape(svg, "text", {x: x(step), y: TOP + HIGH + 14, "text-anchor": anchor}, step);
  }
  names(svg, "step", "mean entropy (nats)");
  if (data.bound !== null) {
    shape(svg, "path", {class: "bound", d: `M${LEFT} ${y(top)}h${WIDE}`});
    shape(svg, "text", {x: LEFT + WIDE, y: y(top) - 4, "text-anchor": "end"}, "maximum");
  }
  const here = shape(svg, "path", {class: "here"});
  const lines = data.variants.map(variant => shape(svg, "path", {class: "curve", stroke: variant.colour,
    "stroke-dasharray": variant.dash}));
  return index => {
    title.textContent = `${nameOf(data, shown.layer)}, head ${shown.head}`;
    here.setAttribute("d", `M${x(data.steps[index])} ${TOP}v${HIGH}`);
    lines.forEach((line, i) => {
      let pen = "M", path = "";
      data.variants[i].probes.forEach((probe, at) => {
        const value = probe === null ? undefined : probe[shown.layer]?.[shown.head];
        if (value === undefined) return; // another variant was probed there
        if (value !== null) path += `${pen}${x(data.steps[at]).toFixed(1)} ${y(value).toFixed(1)}`;
        pen = value === null ? "M" : "L";
      });
      line.setAttribute("d", path);
    });
  };
}

for (const figure of document.querySelectorAll(".timeline")) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  for (const variant of data.variants) variant.probes = variant.probes.map(probe => probe && probe.map(unpacked));
  const [slider, when, said, place] = ["input", "output", ".said", ".maps"].map(found => figure.querySelector(found));
  const largest = Math.max(1, ...data.variants.flatMap(variant => variant.probes.flat(2)));
  const top = data.bound === null ? largest : 100 * data.bound;
  const drawn = [...data.variants.map(variant => map(place, data, variant, top)), curves(place, data, top)];
  figure.querySelector(".scale").append(`0`, document.createElement("i"), nats(top));
  timelines.push(() => {
    const index = Math.max(0, data.steps.findLastIndex(step => step <= shown.step)), step = data.steps[index];
    slider.value = index;
    const tokens = data.tokensAStep === null ? "" : `, ${(step * data.tokensAStep / 1e6).toFixed(2)}M tokens`;
    when.textContent = `step ${step}${tokens}`;
    slider.setAttribute("aria-valuetext", when.textContent);
    for (const draw of drawn) draw(index);
    const values = data.variants.map(({name, probes}) => [name, probes[index]?.[shown.layer]?.[shown.head]]);
    const known = values.filter(([, value]) => value !== undefined).map(([name, value]) => `${name} ${nats(value)}`);
    said.textContent = `At step ${step}, ${nameOf(data, shown.layer)}, head ${shown.head}: ${known.join(", ")}.`;
  });
  slider.addEventListener("input", () => show({step: data.steps[slider.value]}));
  figure.hidden = false;
}
show({});
