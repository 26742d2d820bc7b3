"use strict";
const times = JSON.parse(document.getElementById("times").textContent);
for (const figure of document.querySelectorAll("figure.plot")) {
  const svg = figure.querySelector("svg");
  const data = JSON.parse(figure.querySelector("script").textContent);
  const readout = figure.querySelector(".readout");
  const [left, right, top, bottom] = data.area;
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("y1", top);
  cursor.setAttribute("y2", bottom);
  cursor.style.display = "none";
  svg.append(cursor);
  const hide = () => { readout.style.display = cursor.style.display = "none"; };
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale;
    if (x < left || x > right || times.seq.length === 0) return hide();
    const seq = (x - left) / (right - left) * data.events;
    let low = 0, high = times.seq.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (times.seq[middle] < seq) low = middle + 1; else high = middle;
    }
    if (low > 0 && seq - times.seq[low - 1] < times.seq[low] - seq) low--;
    const at = left + times.seq[low] / data.events * (right - left);
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    cursor.style.display = "";
    const rows = [...data.series].reverse().map(series => {
      const row = document.createElement("div");
      const chip = document.createElement("i");
      chip.style.background = series.colour;
      row.append(chip, `${series.name}: ${series.values[low].toLocaleString()}`);
      return row;
    });
    const head = document.createElement("div");
    head.textContent = `event ${times.seq[low].toLocaleString()}, ${times.ms[low].toFixed(1)} ms into the replay (${data.unit})`;
    readout.replaceChildren(head, ...rows);
    readout.style.display = "block";
    const offset = at / scale;
    const room = box.width - offset > readout.offsetWidth + 24;
    readout.style.left = `${room ? offset + 14 : Math.max(0, offset - readout.offsetWidth - 14)}px`;
    readout.style.top = `${box.top - figure.getBoundingClientRect().top + top / scale}px`;
  });
}
