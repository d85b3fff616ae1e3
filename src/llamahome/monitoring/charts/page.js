"use strict";
// Shows the values under the pointer or, with the arrow keys, of a step; the page reads well without it.
for (const plot of document.querySelectorAll(".plot")) {
  const { x: [first, last], curves } = JSON.parse(plot.dataset.chart);
  const area = plot.querySelector(".area");
  const cursor = area.appendChild(Object.assign(document.createElement("div"), { className: "cursor" }));
  const tip = area.appendChild(Object.assign(document.createElement("div"), { className: "tip" }));
  tip.setAttribute("role", "status");
  const steps = [...new Set(curves.flatMap((curve) => curve.points.map((point) => point[0])))].sort((a, b) => a - b);
  let at = steps.length - 1;

  const nearest = (points, step) => points.reduce((best, point) => (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best));
  const show = () => {
    const step = steps[at];
    const share = (step - first) / (last - first);
    tip.replaceChildren();
    const lines = [`step ${step.toLocaleString("en")}`];
    for (const curve of curves) {
      if (!curve.points.length) continue;
      const point = nearest(curve.points, step);
      lines.push(`${curve.name} ${point[2]}${point[0] === step ? "" : ` at ${point[0].toLocaleString("en")}`}`);
    }
    for (const line of lines) tip.appendChild(document.createElement("div")).textContent = line;
    cursor.style.cssText = `display:block;left:${100 * share}%`;
    tip.style.cssText = share < 0.5 ? `display:block;left:calc(${100 * share}% + 10px)` : `display:block;right:calc(${100 - 100 * share}% + 10px)`;
  };
  const hide = () => { cursor.style.display = tip.style.display = "none"; };
  area.addEventListener("pointermove", (event) => {
    const box = area.getBoundingClientRect();
    const step = first + ((event.clientX - box.left) / box.width) * (last - first);
    at = steps.reduce((best, value, index) => (Math.abs(value - step) < Math.abs(steps[best] - step) ? index : best), 0);
    show();
  });
  area.addEventListener("pointerleave", hide);
  area.tabIndex = 0;
  area.addEventListener("focus", show);
  area.addEventListener("blur", hide);
  area.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    at = Math.min(steps.length - 1, Math.max(0, at + move));
    show();
  });
}
