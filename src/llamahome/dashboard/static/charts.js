// One chart: a figure of the page, its curves, and a uPlot in it. Curves have their own x; uPlot.join lays them beside each other.
import { axisFormats, exactFormats, formats } from "./format.js";
import { stacked, together } from "./stack.js";

const HEIGHT = 220;
export const POINTS = 600;
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const POWERS = Array.from({ length: 50 }, (_, power) => 2 ** power);
const MINUTES = [1, 2, 5, 10, 15, 30].map((minutes) => 60 * minutes);
const HOURS = [1, 2, 4, 8, 12, 24, 48, 168].map((hours) => 3600 * hours);
const CLOCK = [1, 2, 5, 10, 15, 30, ...MINUTES, ...HOURS];
const faint = (text) => `${text}55`;

export class Chart {
  constructor(figure) {
    this.figure = figure;
    this.spec = JSON.parse(figure.dataset.chart);
    this.curves = [];
    this.columns = []; // what is drawn of the curves
    this.axis = "step";
    this.log = false;
    this.marks = [];
    this.best = null;
    this.plot = figure.querySelector(".plot");
    this.legend = figure.querySelector(".legend");
    this.button = figure.querySelector(".table-button");
    this.button.addEventListener("click", () => this.toggleTable());
    this.plot.addEventListener("keydown", (event) => this.move(event));
    this.plot.tabIndex = 0;
    this.plot.setAttribute("role", "img");
    this.plot.setAttribute("aria-label", `${this.spec.title}: no values yet`);
    new ResizeObserver(() => this.resize()).observe(this.plot);
    dark.addEventListener("change", () => this.draw());
  }

  // curves: [{name, label, x, y, smooth}], in the order of the colours
  set(curves, { axis, log }) {
    this.curves = curves;
    this.axis = axis;
    this.log = log && this.spec.log;
    this.draw();
  }

  // Adds a value to a curve that is drawn; a curve whose last place is not before x has the value already.
  append(name, x, y, weight) {
    const curve = this.curves.find((each) => each.name === name);
    if (!curve || !Number.isFinite(x) || (curve.x.length && x <= curve.x[curve.x.length - 1])) return false;
    curve.x.push(x);
    curve.y.push(y);
    if (curve.smooth) {
      const last = curve.smooth[curve.smooth.length - 1];
      curve.smooth.push(y === null ? last : last === undefined || last === null ? y : weight * last + (1 - weight) * y);
    }
    return true;
  }

  // A curve that stays at its value.
  prolong(name, x) {
    const curve = this.curves.find((each) => each.name === name);
    if (curve?.x.length) this.append(name, x, curve.y[curve.y.length - 1], 0);
  }

  get crowded() {
    return this.curves.some((curve) => curve.x.length > 3 * POINTS);
  }

  data() {
    this.columns = this.spec.stacked ? together(this.curves, this.spec.shares) : this.curves;
    const usable = (value) => (this.log && value !== null && value <= 0 ? null : value);
    if (this.spec.stacked) return stacked(this.columns);
    const tables = [];
    for (const curve of this.curves) {
      tables.push([curve.x, curve.y.map(usable)]);
      if (curve.smooth) tables.push([curve.x, curve.smooth.map(usable)]);
    }
    return tables.length ? uPlot.join(tables) : [[]];
  }

  draw() {
    const empty = !this.curves.some((curve) => curve.x.length);
    this.figure.querySelector(".nothing").hidden = !empty;
    this.button.hidden = empty;
    if (this.uplot) this.uplot.destroy();
    const data = this.data();
    this.uplot = empty ? null : new uPlot(this.options(), data, this.plot);
    this.figure.uplot = this.uplot;
    this.describe();
  }

  // New values without a new chart; a view that was zoomed stays.
  redraw() {
    if (!this.uplot || this.uplot.series.length !== this.data().length) return this.draw();
    const { x } = this.uplot.scales;
    const before = this.uplot.data[0];
    const zoomed = before.length > 1 && (x.min > before[0] || x.max < before[before.length - 1]);
    this.uplot.setData(this.data(), !zoomed);
    if (zoomed) this.uplot.redraw();
    this.describe();
  }

  options() {
    const text = color("muted");
    const axis = { stroke: text, grid: { stroke: color("line"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
    const write = formats[this.spec.shown];
    const steps = this.spec.shown === "bytes" ? { incrs: POWERS } : {};
    return {
      width: Math.max(120, this.plot.clientWidth),
      height: HEIGHT,
      legend: { show: false },
      padding: [8, 24, 0, 0], // half of a label like "10,000" or "1:00:00" is right of the last value
      cursor: { sync: { key: "run", scales: ["x", null] }, points: { size: 7 }, y: false },
      scales: { x: { time: false }, y: this.scale() },
      axes: [
        { ...axis, values: (_, splits) => splits.map(axisFormats[this.axis]), space: 70, size: 28, ...(this.axis === "time" && { incrs: CLOCK }) },
        { ...axis, values: (_, splits) => splits.map((value) => (value === null ? "" : write(value))), size: 68, ...steps },
      ],
      series: [{}, ...this.series()],
      hooks: { setCursor: [() => this.describeCursor()], draw: [() => this.drawMarks()] },
    };
  }

  scale() {
    if (this.log) return { distr: 3 };
    const share = this.spec.shown === "share";
    const fromZero = share || this.spec.stacked || ["bytes", "count", "small"].includes(this.spec.shown);
    if (!fromZero) return { auto: true };
    return { range: (_, low, high) => [Math.min(0, low ?? 0), share ? Math.max(1, high ?? 1) : (high || 1) * 1.08] };
  }

  series() {
    if (this.spec.stacked) {
      const part = (curve, at) => ({ label: curve.label, width: 0, fill: color(`c${(at % 8) + 1}`), points: { show: false } });
      return this.curves.map(part).reverse();
    }
    const drawn = [];
    this.curves.forEach((curve, at) => {
      const stroke = color(`c${(at % 8) + 1}`);
      const alone = curve.x.length < 2;
      const points = { show: alone || (curve.name.startsWith("eval/") && curve.x.length < 80), size: 5, fill: stroke };
      const dash = curve.name.startsWith("plan/") ? [4, 4] : undefined;
      drawn.push({ label: curve.label, stroke: curve.smooth ? faint(stroke) : stroke, width: curve.smooth ? 1 : 1.5, points, dash });
      if (curve.smooth) drawn.push({ label: `${curve.label}, smoothed`, stroke, width: 2, points: { show: false } });
    });
    return drawn;
  }

  drawMarks() {
    const { ctx, bbox } = this.uplot;
    ctx.save();
    for (const mark of this.marks) {
      const at = this.uplot.valToPos(mark.x, "x", true);
      if (at < bbox.left || at > bbox.left + bbox.width) continue;
      ctx.strokeStyle = color(mark.level === "note" ? "muted" : mark.level === "alert" ? "amber" : "red");
      ctx.lineWidth = devicePixelRatio * (mark.level === "note" ? 1 : 2);
      ctx.setLineDash(mark.level === "note" ? [2 * devicePixelRatio, 4 * devicePixelRatio] : []);
      ctx.beginPath();
      ctx.moveTo(at, bbox.top);
      ctx.lineTo(at, bbox.top + (mark.level === "note" ? bbox.height : bbox.height * 0.18));
      ctx.stroke();
    }
    if (this.best && this.curves.some((curve) => curve.name === "eval/loss")) {
      ctx.setLineDash([]);
      ctx.strokeStyle = color("text");
      ctx.lineWidth = 2 * devicePixelRatio;
      ctx.beginPath();
      ctx.arc(this.uplot.valToPos(this.best.x, "x", true), this.uplot.valToPos(this.best.value, "y", true), 6 * devicePixelRatio, 0, 7);
      ctx.stroke();
    }
    ctx.restore();
  }

  // What the picture shows, in words, and the newest values in the legend.
  describe() {
    const write = exactFormats[this.spec.shown];
    const lasts = this.curves.map((curve) => [curve.label || curve.name, undefined]);
    this.columns.forEach((column, at) => (lasts[at][1] = column.y.findLast((value) => value !== null)));
    this.showLegend(lasts.map(([, value]) => value));
    const points = this.curves.reduce((sum, curve) => sum + curve.x.length, 0);
    const words = lasts.filter(([, value]) => value !== undefined).map(([label, value]) => `${label} ${write(value)}`);
    this.plot.setAttribute("aria-label", `${this.spec.title}: ${points} points; last ${words.join(", ") || "none"}. Arrow keys move along.`);
    if (!this.figure.querySelector(".values").hidden) this.fillTable();
  }

  describeCursor() {
    const at = this.uplot.cursor.idx;
    if (at === null || at === undefined) return this.showLegend(this.columns.map((column) => column.y.findLast((value) => value !== null)));
    const x = this.uplot.data[0][at];
    this.showLegend(this.columns.map((column) => valueAt(column, x)), x);
  }

  showLegend(values, x) {
    const items = this.curves.map((curve, at) => {
      const item = document.createElement("span");
      const swatch = document.createElement("span");
      swatch.className = `swatch c${(at % 8) + 1}`;
      const value = document.createElement("b");
      value.textContent = exactFormats[this.spec.shown](values[at]);
      item.append(swatch, `${curve.label} `, value);
      return item;
    });
    if (x !== undefined) items.unshift(`${this.axis} ${axisFormats[this.axis](x)}`);
    this.legend.replaceChildren(...items);
  }

  move(event) {
    const ways = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
    if (!this.uplot || !(event.key in ways)) return;
    event.preventDefault();
    const xs = this.uplot.data[0];
    const now = this.uplot.cursor.idx ?? (ways[event.key] > 0 ? -1 : xs.length);
    const at = Math.min(Math.max(now + ways[event.key], 0), xs.length - 1);
    this.uplot.setCursor({ left: this.uplot.valToPos(xs[at], "x"), top: HEIGHT / 2 });
  }

  resize() {
    const width = Math.max(120, this.plot.clientWidth);
    if (this.uplot && Math.abs(this.uplot.width - width) > 1) this.uplot.setSize({ width, height: HEIGHT });
  }

  toggleTable() {
    const values = this.figure.querySelector(".values");
    values.hidden = !values.hidden;
    values.tabIndex = 0;
    values.setAttribute("role", "region");
    values.setAttribute("aria-label", `Values of ${this.spec.title}`);
    this.button.setAttribute("aria-expanded", String(!values.hidden));
    if (values.hidden) values.replaceChildren();
    else this.fillTable();
  }

  fillTable() {
    const write = exactFormats[this.spec.shown];
    const table = document.createElement("table");
    const head = table.createTHead().insertRow();
    for (const label of [this.axis, ...this.curves.map((curve) => curve.label || this.spec.title)]) {
      const cell = document.createElement("th");
      cell.scope = "col";
      cell.textContent = label;
      head.append(cell);
    }
    const body = table.createTBody();
    const places = [...new Set(this.columns.flatMap((column) => column.x))].sort((a, b) => a - b);
    const known = this.columns.map((column) => new Map(column.x.map((x, at) => [x, column.y[at]])));
    for (const x of places) {
      const row = body.insertRow();
      row.insertCell().textContent = this.axis === "time" ? axisFormats.time(x) : x.toLocaleString("en");
      for (const values of known) row.insertCell().textContent = (values.get(x) ?? null) === null ? "" : write(values.get(x));
    }
    this.figure.querySelector(".values").replaceChildren(table);
  }
}

// The value of a curve at x, or the last one before it.
function valueAt(curve, x) {
  let low = 0;
  let high = curve.x.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (curve.x[middle] <= x) low = middle + 1;
    else high = middle;
  }
  return low ? curve.y[low - 1] : undefined;
}

export function curvesAddress(run, names, options) {
  const query = new URLSearchParams({ names: names.join(","), points: String(POINTS), ...options });
  return `/api/run/${encodeURIComponent(run)}/curves?${query}`;
}

export async function fetchCurves(address) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error(`curves: ${answer.status}`);
  return answer.json();
}

// Axis, smoothing and log of the page; `changed` is called with true if the curves have to be fetched again.
export function readControls(changed) {
  const form = document.getElementById("controls");
  const settings = { axis: "step", smooth: 0, log: false };
  if (!form) return { ...settings, axis: "time" };
  const { x, smooth, log } = form.elements;
  const output = form.querySelector("output");
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => {
    const fetches = settings.axis !== x.value || settings.smooth !== Number(smooth.value);
    Object.assign(settings, { axis: x.value, smooth: Number(smooth.value), log: log.checked });
    output.textContent = smooth.value;
    changed(fetches);
  });
  form.reset();
  return settings;
}
