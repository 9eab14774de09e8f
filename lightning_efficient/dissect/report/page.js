"use strict";
// Sorts a table by the column whose head is pressed: rising first, then falling; cells without a number come last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const rising = head.getAttribute("aria-sort") !== "ascending";
      const rows = [...body.rows];
      const numeric = rows.some((row) => row.cells[column].dataset.v !== undefined);
      const key = (row) => {
        const cell = row.cells[column];
        return numeric ? (cell.dataset.v === undefined ? NaN : Number(cell.dataset.v)) : cell.textContent;
      };
      rows.sort((first, second) => {
        const [a, b] = [key(first), key(second)];
        if (numeric && (Number.isNaN(a) || Number.isNaN(b))) return Number.isNaN(a) - Number.isNaN(b);
        const order = numeric ? a - b : a.localeCompare(b, "en", { numeric: true });
        return rising ? order : -order;
      });
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      body.append(...rows);
    });
  });
}
// A printed page has no one to open its parts.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => (each.open = true)));
