"use strict";
// Hover values: one floating box takes the place of the browser's own titles, so that touch shows them too.
const tip = document.body.appendChild(Object.assign(document.createElement("div"), { id: "tip", hidden: true }));
for (const spot of document.querySelectorAll("td[title]")) {
  spot.dataset.tip = spot.title;
  spot.removeAttribute("title");
}
for (const title of document.querySelectorAll("svg title")) {
  title.parentElement.dataset.tip = title.textContent;
  title.remove();
}
function show(event) {
  const spot = event.target.closest("[data-tip]");
  tip.hidden = !spot;
  if (!spot) return;
  tip.textContent = spot.dataset.tip;
  const edge = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = Math.max(4, Math.min(event.pageX + 12, edge)) + "px";
  tip.style.top = event.pageY + 16 + "px";
}
addEventListener("pointermove", show);
addEventListener("pointerdown", show);
addEventListener("scroll", () => { tip.hidden = true; }, true);

// Sortable tables: numbers by data-v, the rest as text; what was not measured stays last either way.
function key(row, column) {
  const cell = row.cells[column];
  if (cell.dataset.v !== undefined) return cell.dataset.v === "" ? null : Number(cell.dataset.v);
  return cell.textContent;
}
function compare(a, b) {
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
}
for (const head of document.querySelectorAll("table.sortable thead th")) {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: head.textContent });
  head.replaceChildren(button);
  button.addEventListener("click", () => {
    const table = head.closest("table"), body = table.tBodies[0], column = head.cellIndex;
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = [...body.rows].map((row) => [key(row, column), row]);
    rows.sort(([a], [b]) => (a === null ? 1 : 0) - (b === null ? 1 : 0) || (up ? 1 : -1) * compare(a, b));
    body.append(...rows.map(([, row]) => row));
  });
}

// A filter above each long table: every word must occur in the row.
for (const table of document.querySelectorAll("table.findable")) {
  const find = Object.assign(document.createElement("input"), { type: "search", className: "find" });
  find.placeholder = "Filter rows, for example: moe_gpu forward 512";
  find.setAttribute("aria-label", "Filter rows");
  table.closest(".scroll").before(find);
  find.addEventListener("input", () => {
    const words = find.value.toLowerCase().split(/\s+/);
    for (const row of table.tBodies[0].rows) {
      const cells = [...row.cells].map((cell) => cell.textContent.toLowerCase()).join(" ");
      row.hidden = !words.every((word) => cells.includes(word));
    }
  });
}
addEventListener("beforeprint", () => {
  for (const closed of document.querySelectorAll("details")) closed.open = true;
});
