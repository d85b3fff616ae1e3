// The list of runs: filters while one types, counts the ticked runs, and renews states and losses while the page is seen.

const form = document.querySelector("form[role=search]");
const compare = document.getElementById("compare");
const rows = [...document.querySelectorAll("tr[data-run]")];
const SECONDS = 5;
const MOST = 8;

if (form) {
  form.querySelector("button").hidden = true;
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", filter);
  compare.addEventListener("change", count);
  setInterval(renew, SECONDS * 1000);
  // rows that the server has left out because of the address come back only with the page
  if (!location.search) filter();
  count();
}

function filter() {
  const words = form.elements.q.value.toLowerCase();
  const state = form.elements.state.value;
  if (location.search) {
    location.assign(`/?${new URLSearchParams({ q: form.elements.q.value, state })}`);
    return;
  }
  let shown = 0;
  for (const row of rows) {
    row.hidden = !(row.dataset.run.toLowerCase().includes(words) && (!state || row.dataset.state === state));
    shown += !row.hidden;
  }
  document.getElementById("none").hidden = shown > 0;
}

function count() {
  const ticked = compare.querySelectorAll("input[name=run]:checked").length;
  document.getElementById("compare-button").disabled = ticked < 2 || ticked > MOST;
  document.getElementById("ticked").textContent = ticked ? `${ticked} ticked` : "Tick two to eight runs to see them together.";
}

async function renew() {
  if (document.hidden) return;
  let found;
  try {
    found = await (await fetch("/api/runs")).json();
  } catch {
    return; // the server has ended; what is shown stays
  }
  const known = new Map(found.map((each) => [each.id, each]));
  if (!location.search && found.some((each) => !rows.some((row) => row.dataset.run === each.id))) return location.reload();
  for (const row of rows) {
    const now = known.get(row.dataset.run);
    if (!now) continue;
    row.dataset.state = now.state;
    row.querySelector("progress").value = now.share;
    const badge = row.querySelector(".state");
    badge.textContent = now.state;
    badge.className = `state ${now.state}`;
    for (const name of ["step", "loss", "eval_loss", "tokens"]) row.querySelector(`[data-field=${name}]`).textContent = now[name];
  }
}
