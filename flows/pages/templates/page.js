"use strict";
(() => {
  const soft = { labelColor: "var(--soft)", titleColor: "var(--soft)" };
  const config = {
    background: null,
    font: "system-ui, 'DejaVu Sans', sans-serif",
    view: { stroke: null },
    axis: { ...soft, gridColor: "var(--line)", domainColor: "var(--line)", tickColor: "var(--line)",
            titleFontWeight: "normal", labelFontSize: 11, titleFontSize: 11.5, labelLimit: 220 },
    axisX: { grid: true, titleAnchor: "start" },
    axisXOrdinal: { grid: false },
    axisY: { titleAnchor: "end", titleAngle: 0, titleAlign: "left", titleX: 0, titleY: -12 },
    legend: { ...soft, titleFontWeight: "normal", labelFontSize: 11, titleFontSize: 11.5 },
  };
  const json = (node) => JSON.parse(node.textContent);
  const data = new Map();
  const rowsOf = (id) => {
    if (!data.has(id)) {
      const { names, rows } = json(document.getElementById(id));
      data.set(id, rows.map((row) => Object.fromEntries(row.map((value, place) => [names[place], value]))));
    }
    return data.get(id);
  };

  // charts
  const charts = [...document.querySelectorAll(".chart")];
  const draw = async (node) => {
    const spec = json(node.nextElementSibling);
    Object.assign(spec, { width: "container", data: { name: "rows", values: rowsOf(node.dataset.rows) },
                          description: node.dataset.name });
    if (document.getElementById("rows-ghosts")) spec.datasets = { ghosts: rowsOf("rows-ghosts") };
    const result = await window.vegaEmbed(node, spec, { renderer: "svg", actions: false, mode: "vega-lite", config, tooltip: { theme: "custom" } });
    result.view.logLevel(1); // errors only: filters may leave a layer empty, which Vega warns about
    node.view = result.view;
  };
  const drawn = Promise.all(charts.map(draw));

  // tables: a click on a head sorts by it, a second one the other way; what is not known stays at the end
  const tableRows = (node) => rowsOf(`rows-${node.closest("section").id}`);
  const order = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b);
  document.querySelectorAll("th button").forEach((button) => button.addEventListener("click", () => {
    const head = button.closest("th");
    const rows = tableRows(head);
    const down = head.getAttribute("aria-sort") === "ascending";
    head.parentNode.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = head.closest("table").tBodies[0];
    const sorted = [...body.rows].map((line) => [rows[Number(line.dataset.row)][head.dataset.name], line]);
    const known = sorted.filter(([value]) => value !== null);
    known.sort(([a], [b]) => (down ? -1 : 1) * order(a, b));
    body.append(...known.map(([, line]) => line), ...sorted.filter(([value]) => value === null).map(([, line]) => line));
  }));
  const quoted = (value) => (value === null ? "" : /[",\n\r]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : String(value));
  document.querySelectorAll("button.csv").forEach((button) => button.addEventListener("click", () => {
    const details = button.closest("details");
    const names = [...details.querySelectorAll("th")].map((head) => head.dataset.name);
    const lines = [...details.querySelectorAll("tbody tr:not([hidden])")].map((line) => tableRows(details)[Number(line.dataset.row)]);
    const text = [names, ...lines.map((row) => names.map((name) => row[name]))].map((row) => row.map(quoted).join(",")).join("\n");
    const link = document.createElement("a");
    link.download = `${button.closest("section").id}.csv`;
    link.href = URL.createObjectURL(new Blob([`${text}\n`], { type: "text/csv" }));
    link.click();
    URL.revokeObjectURL(link.href);
  }));

  // filters: what is not ticked leaves charts and tables alike
  const form = document.querySelector(".filters");
  const filtered = form ? form.dataset.sections.split(" ") : [];
  const filter = () => {
    const off = [...form.querySelectorAll("input:not(:checked)")];
    const stays = (row) => !off.some((box) => row[box.name] !== undefined && String(row[box.name]) === box.value);
    filtered.forEach((id) => {
      if (!document.getElementById(`rows-${id}`)) return;
      const rows = rowsOf(`rows-${id}`);
      const left = rows.filter(stays);
      charts.filter((node) => node.dataset.rows === `rows-${id}` && node.view).forEach((node) => node.view.data("rows", left).runAsync());
      if (id === "ghosts") charts.filter((node) => node.view).forEach((node) => node.view.data("ghosts", left).runAsync());
      document.querySelectorAll(`#${id} tbody tr`).forEach((line) => { line.hidden = !stays(rows[Number(line.dataset.row)]); });
    });
  };
  if (form) form.addEventListener("change", () => drawn.then(filter));

  // paper shows what a click would
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")].filter((node) => node.querySelectorAll("tbody tr").length <= 80);
    opened.forEach((node) => { node.open = true; });
  });
  addEventListener("afterprint", () => opened.forEach((node) => { node.open = false; }));

  drawn.then(() => document.body.setAttribute("data-drawn", charts.length));
})();
