"use strict";
// Makes the names of a table's columns into buttons that sort its rows. Without this script the rows stay as written.
// The first click sorts upwards, the second downwards, the third brings back the order in which the page was written.
const NEXT = {none: "ascending", ascending: "descending", descending: "none"};

// What a cell is sorted by: of a column of numbers the first number, else the text; "" where the cell says nothing.
function keyOf(cell, isNumber) {
  const text = cell.textContent.trim().replace("−", "-");
  if (text === "" || text === "–") return "";
  if (!isNumber) return text;
  const number = parseFloat(text.replace(/,/g, "").replace(/^([+-]?)inf/, "$1Infinity"));
  return Number.isNaN(number) ? "" : number;
}

// Rows that say nothing in this column come last in either direction; rows that are equal stay in their order.
function sorted(rows, column, isNumber, order) {
  const sign = order === "ascending" ? 1 : -1;
  const differ = (a, b) => (isNumber ? a - b : a.localeCompare(b, "en", {numeric: true}));
  const compare = (a, b) => (a === b ? 0 : a === "" ? 1 : b === "" ? -1 : sign * differ(a, b));
  const keyed = rows.map((row) => [keyOf(row.cells[column], isNumber), row]);
  return keyed.sort(([a], [b]) => compare(a, b)).map(([, row]) => row);
}

for (const table of document.querySelectorAll("table.sorts")) {
  const body = table.tBodies[0], written = [...body.rows], columns = [...table.tHead.rows[0].cells];
  columns.forEach((column, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.title = "Sort the table by this column";
    button.textContent = column.textContent;
    button.addEventListener("click", () => {
      const order = NEXT[column.getAttribute("aria-sort")];
      for (const other of columns) other.setAttribute("aria-sort", other === column ? order : "none");
      const isNumber = column.className === "num";
      body.append(...(order === "none" ? written : sorted(written, index, isNumber, order)));
    });
    column.setAttribute("aria-sort", "none");
    column.replaceChildren(button);
  });
}
