// Hovering a chart shows the values of every run at that place. Everything else on the page works without this script.
const hover = () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  tip.style.display = "none";
  const format = (v) => {
    if (v === null || v === undefined) return "–";
    const a = Math.abs(v);
    if (a !== 0 && a < 1e-3) return v.toExponential(2);
    if (a < 1) return v.toFixed(4);
    if (a < 100) return v.toFixed(3);
    return Math.round(v).toLocaleString("en");
  };
  const nearest = (list, x) => {
    let low = 0, high = list.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (list[middle] < x) low = middle + 1; else high = middle;
    }
    return low > 0 && x - list[low - 1] < list[low] - x ? low - 1 : low;
  };
  const row = (left, right, colour) => {
    const div = document.createElement("div");
    const name = document.createElement("span");
    if (colour !== null) {
      const swatch = document.createElement("i");
      swatch.className = "swatch c" + colour;
      name.append(swatch);
    }
    name.append(left);
    const value = document.createElement("b");
    value.textContent = right;
    div.append(name, value);
    return div;
  };
  for (const svg of document.querySelectorAll("svg.chart")) {
    const { width } = svg.viewBox.baseVal;
    const [x0, x1] = svg.dataset.values.split(",").map(Number);
    const [left, right, top, floor] = svg.dataset.frame.split(",").map(Number);
    const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
    cursor.setAttribute("class", "cursor");
    cursor.setAttribute("y1", top);
    cursor.setAttribute("y2", floor);
    const hide = () => { tip.style.display = "none"; cursor.remove(); };
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const across = (event.clientX - box.left) / box.width * width;
      const reach = (x1 - x0) / 100;
      const x = x0 + (across - left) / (right - left) * (x1 - x0);
      if (!(x >= x0 - reach && x <= x1 + reach)) return hide();
      tip.replaceChildren();
      let at = null;
      data.forEach((run, i) => {
        const toggle = document.getElementById("run-" + i);
        if (toggle && !toggle.checked) return;
        for (const [name, line] of Object.entries(run.lines[svg.dataset.key] || {})) {
          const list = line[svg.dataset.x];
          if (!list.length) continue;
          const k = nearest(list, x);
          if (at === null) at = list[k];
          const mean = line.mean ? " (mean " + format(line.mean[k]) + ")" : "";
          tip.append(row((data.length > 1 ? run.name + " " : "") + name, format(line.y[k]) + mean, line.colour));
        }
      });
      if (at === null) return hide();
      const head = row(svg.dataset.x, Math.round(at).toLocaleString("en"), null);
      head.className = "at";
      tip.prepend(head);
      const px = left + (at - x0) / (x1 - x0) * (right - left);
      cursor.setAttribute("x1", px);
      cursor.setAttribute("x2", px);
      svg.append(cursor);
      tip.style.display = "block";
      const room = { across: window.innerWidth - tip.offsetWidth - 8, down: window.innerHeight - tip.offsetHeight - 8 };
      tip.style.left = Math.max(8, Math.min(event.clientX + 16, room.across)) + "px";
      tip.style.top = Math.max(8, Math.min(event.clientY + 14, room.down)) + "px";
    });
  }
};
hover();
