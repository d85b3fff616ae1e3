// Several runs in the same charts: one curve and one colour for each run. Runs that train are read again every ten seconds.
import { Chart, curvesAddress, fetchCurves, readControls } from "./charts.js";

const runs = [...document.querySelectorAll("#compared tr[data-run]")].map((row) => row.dataset.run);
const charts = [...document.querySelectorAll(".chart")].map((figure) => new Chart(figure));
const settings = readControls((fetches) => (fetches ? load() : show()));
let turn = 0;

async function load() {
  const mine = ++turn;
  for (const chart of charts) {
    const [[name]] = chart.spec.lines;
    const options = { x: settings.axis };
    if (settings.smooth && chart.spec.smooth) options.smooth = settings.smooth;
    const found = await Promise.all(runs.map((run) => fetchCurves(curvesAddress(run, [name], options))));
    if (mine !== turn) return;
    chart.set(
      found.map((each, at) => ({ name, label: runs[at], ...(each.lines[name] ?? { x: [], y: [], smooth: null }) })),
      settings,
    );
  }
}

function show() {
  for (const chart of charts) chart.set(chart.curves, settings);
}

const attempt = () => load().catch(() => {}); // the server has ended; what is shown stays
if (charts.length) {
  attempt();
  if (document.querySelector("#compared .state.running")) setInterval(() => document.hidden || attempt(), 10000);
}
