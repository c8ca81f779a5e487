"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const one = (id) => document.getElementById(id);
  for (const element of all(".script")) element.hidden = false;
  addEventListener("beforeprint", () => { for (const details of all("details")) details.open = true; });

  // What a cell says begins with its number; a dash is none.
  const numberOf = (text) => { const value = parseFloat(text); return Number.isNaN(value) ? null : value; };

  // Sorting: a button in every head; a third press restores the order of computation. Missing values come last.
  const sortBy = (table, column, direction) => {
    const body = table.tBodies[0];
    const key = (row) => {
      if (direction === "none") return Number(row.dataset.index);
      if (column === 0) return row.dataset.layer;
      return numberOf(row.cells[column].textContent);
    };
    const sign = direction === "descending" ? -1 : 1;
    const compare = (a, b) => {
      const [first, second] = [key(a), key(b)];
      if (first === null || second === null) return (first === null) - (second === null);
      if (typeof first === "string") return sign * first.localeCompare(second, undefined, { numeric: true });
      return sign * (first - second);
    };
    body.append(...[...body.rows].sort(compare));
  };
  const sorted = new Map();
  const resort = (table) => { if (sorted.has(table)) sortBy(table, ...sorted.get(table)); };
  for (const table of all("table.filtered")) {
    [...table.tBodies[0].rows].forEach((row, index) => { row.dataset.index = index; });
    all("thead th", table).forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      const title = head.querySelector(".head");
      button.append(...title.childNodes);
      title.replaceWith(button);
      button.addEventListener("click", () => {
        const next = { none: column ? "descending" : "ascending", descending: column ? "ascending" : "none",
          ascending: column ? "none" : "descending" }[head.getAttribute("aria-sort")];
        for (const other of all("thead th", table)) other.setAttribute("aria-sort", "none");
        head.setAttribute("aria-sort", next);
        sorted.set(table, [column, next]);
        resort(table);
      });
    });
  }
  const map = one("map");
  if (!map) return;

  // The chosen point: what the table of layers shows, underlined in the map, a line in the charts.
  const table = one("layers"), select = one("point"), heads = all("thead th", map).slice(1);
  const showPoint = (point) => {
    select.value = String(point);
    heads.forEach((head, index) => head.classList.toggle("chosen", index === point));
    for (const row of table.tBodies[0].rows) {
      const values = data.cells[Number(row.dataset.index)][point];
      [...row.cells].slice(1).forEach((cell, column) => {
        cell.textContent = values === null ? "–" : values.t[column];
      });
    }
    if (data.alphas) for (const line of all(".cursor")) {
      const left = Number(line.dataset.left), x = left + data.alphas[point] * (Number(line.dataset.right) - left);
      line.setAttribute("x1", x);
      line.setAttribute("x2", x);
      line.setAttribute("visibility", "visible");
    }
    resort(table);
    filter();
  };

  // Filtering: every word must be part of the name; the ratio is that of the chosen point.
  const words = one("filter"), least = one("least");
  const filter = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const limit = least.value === "" ? -Infinity : Number(least.value);
    const point = Number(select.value);
    const ratios = new Map(data.layers.map((name, row) => [name, numberOf(data.cells[row][point]?.t[3])]));
    const kept = (name, isLayer) => {
      const lower = name.toLowerCase();
      return wanted.every((word) => lower.includes(word)) &&
        (!isLayer || limit === -Infinity || (ratios.get(name) ?? -Infinity) >= limit);
    };
    for (const shownTable of [map, ...all("table.filtered")]) {
      const isLayer = shownTable === map || shownTable === table;
      for (const row of shownTable.tBodies[0].rows) row.hidden = !kept(row.dataset.layer, isLayer);
    }
    const shown = data.layers.filter((name) => kept(name, true)).length;
    one("count").textContent = `${shown} of ${data.layers.length} layers shown`;
    if (!current || current.parentElement.hidden) enter(all("tbody td", map).find((cell) => !cell.parentElement.hidden));
  };
  words.addEventListener("input", filter);
  least.addEventListener("input", filter);
  select.addEventListener("change", () => showPoint(Number(select.value)));

  // The map as a grid: one stop of the tab key, arrows within.
  let current = null;
  const enter = (cell) => {
    if (current) current.tabIndex = -1;
    current = cell ?? null;
    if (current) current.tabIndex = 0;
  };
  const indices = (cell) => [data.layers.indexOf(cell.parentElement.dataset.layer), cell.cellIndex - 1];
  const readout = one("readout");
  const read = (cell) => {
    const [row, point] = indices(cell), values = data.cells[row][point];
    const names = all("thead th", table).slice(1).map((head) => head.querySelector(".sort").textContent);
    const numbers = values === null ? "not measured" : values.t.map((text, column) => `${names[column]} ${text}`).join(", ");
    readout.replaceChildren(Object.assign(document.createElement("strong"), { textContent: data.layers[row] }),
      ` at ${data.points[point]}: ${numbers}`);
  };
  for (const cell of all("tbody td", map)) { cell.tabIndex = -1; cell.setAttribute("role", "gridcell"); }
  map.addEventListener("mouseover", (event) => { const cell = event.target.closest("td"); if (cell) read(cell); });
  map.addEventListener("focusin", (event) => { const cell = event.target.closest("td"); if (cell) { enter(cell); read(cell); } });
  map.addEventListener("click", (event) => { const cell = event.target.closest("td"); if (cell) { cell.focus(); showPoint(indices(cell)[1]); } });
  map.addEventListener("keydown", (event) => {
    const cell = event.target.closest("td");
    if (!cell || event.altKey || event.metaKey) return;
    const rows = [...map.tBodies[0].rows].filter((row) => !row.hidden), row = rows.indexOf(cell.parentElement);
    const last = cell.parentElement.cells.length - 1;
    let [y, x] = [row, cell.cellIndex];
    if (event.key === "ArrowRight") x += 1;
    else if (event.key === "ArrowLeft") x -= 1;
    else if (event.key === "ArrowDown") y += 1;
    else if (event.key === "ArrowUp") y -= 1;
    else if (event.key === "Home") [y, x] = event.ctrlKey ? [0, 1] : [y, 1];
    else if (event.key === "End") [y, x] = event.ctrlKey ? [rows.length - 1, last] : [y, last];
    else if (event.key === "Enter" || event.key === " ") showPoint(indices(cell)[1]);
    else return;
    event.preventDefault();
    const target = rows[Math.min(Math.max(y, 0), rows.length - 1)].cells[Math.min(Math.max(x, 1), last)];
    if (target !== cell) target.focus();
  });

  // What the map shows.
  for (const radio of all("input[name=quantity]")) radio.addEventListener("change", () => {
    const quantity = Number(radio.value);
    all(".legend").forEach((legend, index) => { legend.hidden = index !== quantity; });
    for (const cell of all("tbody td", map)) {
      const [row, point] = indices(cell), values = data.cells[row][point];
      if (values === null) continue;
      cell.className = values.s[quantity];
      cell.textContent = values.m[quantity];
    }
  });
  showPoint(Number(select.value));
})();
