"use strict";
const shown = (cell) => cell.querySelector("data")?.value ?? cell.textContent.trim();
const compared = (a, b) => {
  const [x, y] = [a, b].map((text) => (text === "" ? NaN : Number(text)));
  if (!isNaN(x) && !isNaN(y)) return x - y;
  return isNaN(x) - isNaN(y) || (a < b ? -1 : a > b ? 1 : 0);
};
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const place = [...head.parentNode.children].indexOf(head);
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentNode.children) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = head.closest("table").tBodies[0];
    const rows = [...body.rows].map((row) => [shown(row.cells[place]), row]);
    rows.sort((a, b) => (down ? -1 : 1) * compared(a[0], b[0]));
    body.append(...rows.map(([, row]) => row));
  });
}
const quoted = (text) => {
  const safe = isNaN(Number(text)) && /^[=+\-@\t\r]/.test(text) ? "'" + text : text;
  return '"' + safe.replaceAll('"', '""') + '"';
};
for (const button of document.querySelectorAll("button.save")) {
  button.addEventListener("click", () => {
    const table = document.getElementById(button.dataset.table);
    const lines = [...table.rows].map((row) => [...row.cells].map((c) => quoted(shown(c))).join(","));
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([lines.join("\r\n") + "\r\n"], { type: "text/csv" }));
    link.download = button.dataset.table + ".csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
}
