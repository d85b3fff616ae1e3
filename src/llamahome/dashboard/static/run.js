// The page of a run: loads its curves, then follows the live stream. The page of the machine uses it too, with its own charts.
import { Chart, curvesAddress, fetchCurves, readControls } from "./charts.js";
import { figure, formats } from "./format.js";

const run = document.getElementById("run").dataset.run;
const charts = [...document.querySelectorAll(".chart")].map((figure) => new Chart(figure));
const reading = document.getElementById("reading");
const settings = readControls((fetches) => (fetches ? load() : show()));
const last = { step: 0, tokens: 0, began: null, secondsPerStep: null };
const recent = [];
const MOST_ROWS = 8; // of an alert, as in macros.html
// What the head of the page has asked for already, so that the losses are read while the scripts are.
const asked = document.querySelector("link[rel=preload][as=fetch]")?.getAttribute("href");
let turn = 0;
let source = null;
let cursor = null;

const text = (id, value) => {
  const place = document.getElementById(id);
  if (place && value !== undefined) place.textContent = value;
};

async function load() {
  const mine = ++turn;
  if (source) source.close();
  source = cursor = null;
  try {
    for (const chart of charts) {
      if (chart.spec.lines.length && !(await loadChart(chart, mine))) return;
    }
    await loadMarks(mine);
  } catch {
    return retry(mine);
  }
  if (mine === turn) follow();
}

async function loadChart(chart, mine) {
  const { spec } = chart;
  const options = { x: settings.axis, stacked: Number(spec.stacked), machine: Number(spec.machine) };
  if (settings.smooth && spec.smooth) options.smooth = settings.smooth;
  const names = spec.lines.map(([name]) => name);
  if (spec.name === "loss") {
    const usual = asked && settings.axis === "step" && !settings.smooth;
    const early = await fetchCurves(usual ? asked : curvesAddress(run, names, { ...options, hurry: 1 }));
    if (mine !== turn) return false;
    put(chart, early);
    if (early.complete) return true;
    tell("This is a long run: the training loss is here, the rest is being read.");
  }
  const found = await fetchCurves(curvesAddress(run, names, options));
  if (mine !== turn) return false;
  put(chart, found);
  tell("");
  return true;
}

function put(chart, found) {
  const curves = chart.spec.lines.map(([name, label]) => ({ name, label, ...(found.lines[name] ?? { x: [], y: [], smooth: null }) }));
  chart.set(curves, settings);
  if (!found.complete) return;
  last.began ??= found.began;
  cursor ??= found.cursor;
}

function show() {
  for (const chart of charts) chart.set(chart.curves, settings);
}

async function loadMarks(mine) {
  const answer = await fetch(`/api/run/${encodeURIComponent(run)}/marks?x=${settings.axis}`);
  const found = await answer.json();
  if (mine !== turn) return;
  for (const chart of charts.filter((each) => !each.spec.machine)) {
    chart.marks = found.marks;
    chart.best = found.best;
    if (chart.uplot) chart.uplot.redraw(false);
  }
  last.secondsPerStep = found.seconds_per_step;
  if (found.best && document.getElementById("label-best")?.textContent === "Best held-out loss") text("figure-best", figure(found.best.value));
  const speed = charts.find((chart) => chart.spec.name === "speed")?.curves[0]?.y.at(-1);
  if (speed) text("figure-speed", formats.count(speed));
  if (document.getElementById("run").dataset.state !== "running") text("figure-left", formats.seconds(found.seconds));
}

function tell(words) {
  if (!reading) return;
  reading.textContent = words;
  reading.hidden = !words;
}

function retry(mine) {
  if (mine !== turn) return;
  tell("The server does not answer; the training is not affected. Trying again …");
  setTimeout(() => mine === turn && load(), 2000);
}

function follow() {
  if (document.hidden) return;
  source = new EventSource(`/api/run/${encodeURIComponent(run)}/live?cursor=${cursor ?? "0-0"}`);
  source.addEventListener("open", () => tell(""));
  source.addEventListener("error", () => retryStream());
  source.addEventListener("restart", () => load());
  source.addEventListener("records", (event) => grow(JSON.parse(event.data), false));
  source.addEventListener("machine", (event) => grow(JSON.parse(event.data), true));
  source.addEventListener("state", (event) => showState(JSON.parse(event.data)));
  source.addEventListener("events", (event) => showEvents(JSON.parse(event.data)));
}

function retryStream() {
  tell("The server does not answer; the training is not affected. Trying again …");
  if (source.readyState === EventSource.CLOSED) retry(turn);
}

function place(record) {
  if (settings.axis === "time") return record.t - (last.began ?? record.t);
  return settings.axis === "step" ? last.step : last.tokens;
}

function grow(records, machine) {
  for (const record of records) {
    if (!machine) {
      last.began ??= record.t;
      last.step = record.step ?? last.step;
      last.tokens = record["train/tokens"] ?? last.tokens;
      if ("train/loss" in record) pace(record);
    }
    for (const chart of charts.filter((each) => each.spec.machine === machine)) {
      for (const [name] of chart.spec.lines) {
        if (name in record) chart.changed = chart.append(name, place(record), record[name], settings.smooth) || chart.changed;
        else if (name === "plan/memory" && "train/loss" in record) chart.prolong(name, place(record));
      }
    }
    if (record["speed/tokens_per_s"]) text("figure-speed", formats.count(record["speed/tokens_per_s"]));
  }
  if (charts.some((chart) => chart.crowded)) return load();
  requestAnimationFrame(() => {
    for (const chart of charts.filter((each) => each.changed)) {
      chart.changed = false;
      chart.redraw();
    }
  });
}

// Seconds of a step over the newest records.
function pace({ step, t }) {
  recent.push({ step, t });
  if (recent.length > 50) recent.shift();
  const steps = step - recent[0].step;
  if (steps > 0) last.secondsPerStep = (t - recent[0].t) / steps;
}

function showState(state) {
  const head = document.getElementById("run");
  const before = head.dataset.state;
  head.dataset.state = state.state;
  const badge = document.querySelector("#state .state");
  badge.textContent = state.state;
  badge.className = `state ${state.state}`;
  document.getElementById("progress").value = state.share;
  text("step", state.step);
  text("horizon", state.horizon ?? undefined);
  text("early", state.early);
  text("figure-loss", state.loss);
  text("figure-eval-loss", state.eval_loss);
  text("figure-tokens", state.tokens);
  const whole = (words) => Number(String(words).replaceAll(",", ""));
  if (state.state === "running" && last.secondsPerStep && state.horizon) {
    const untilLast = (whole(state.horizon) - whole(state.step)) * last.secondsPerStep;
    const untilLimit = state.ends_at ? Math.max(0, state.ends_at - Date.now() / 1000) : Infinity;
    text("figure-left", formats.seconds(Math.min(untilLast, untilLimit)));
  }
  if (before === state.state) return;
  loadMarks(turn).catch(() => {});
  renewParts().catch(() => {});
}

// Its models, and what may be done with it, as the server writes them now.
async function renewParts() {
  if (!document.getElementById("models")) return;
  const page = new DOMParser().parseFromString(await (await fetch(location.href)).text(), "text/html");
  for (const id of ["models", "controls-of-run"]) {
    const fresh = page.getElementById(id);
    if (fresh) document.getElementById(id)?.replaceWith(fresh);
  }
  // a run that has ended can go on when its process has ended too
  const alive = document.getElementById("controls-of-run")?.hasAttribute("data-alive");
  if (alive && document.getElementById("run").dataset.state !== "running") setTimeout(() => renewParts().catch(() => {}), 1000);
}

function showEvents({ alerts, first }) {
  if (first) return;
  loadMarks(turn).catch(() => {});
  const section = document.getElementById("alerts");
  if (!section) return;
  for (const alert of alerts) {
    const item = document.createElement("li");
    item.className = alert.level;
    const kind = document.createElement("strong");
    kind.textContent = alert.kind;
    item.append(kind, `${alert.step === null ? "" : ` at step ${alert.step.toLocaleString("en")}`}${alert.text ? `: ${alert.text}` : ""}`);
    if (alert.help) {
      const help = document.createElement("code");
      help.className = "command";
      help.textContent = alert.help;
      item.append(document.createElement("br"), help);
    }
    alert.rows.slice(0, MOST_ROWS).forEach((row, at) => {
      const link = document.createElement("a");
      link.href = `/run/${encodeURIComponent(run)}/data?at=${encodeURIComponent(row)}`;
      link.textContent = row;
      if (at === 0) item.append(document.createElement("br"));
      item.append(at === 0 ? "rows: " : ", ", link);
    });
    if (alert.rows.length > MOST_ROWS) item.append(`, and ${(alert.rows.length - MOST_ROWS).toLocaleString("en")} more`);
    if (alert.show) {
      const show = document.createElement("code");
      show.className = "command";
      show.textContent = alert.show;
      item.append(" ", show);
    }
    section.querySelector("ul").prepend(item);
    section.hidden = false;
  }
}

document.addEventListener("visibilitychange", () => {
  // a browser opens six connections to a server, so a page that nobody sees gives its one back
  if (document.hidden && source) {
    source.close();
    source = null;
  } else if (!document.hidden && !source && cursor) load();
});
load();
