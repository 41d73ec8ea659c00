"use strict";

// A click on a header sorts by that column: numbers by what they begin with, so "15.64 ± 0.22" is 15.64.
const NUMBER = /^[+-]?\d+(\.\d+)?(e[+-]?\d+)?/;
const number = text => Number(text.replace(/,(?=\d{3})/g, "").match(NUMBER)?.[0] ?? NaN);
const missing = text => text === "" || text === "not finite";

function sort(head) {
  const body = head.closest("table").tBodies[0];
  const rows = [...body.rows].map(row => [row.cells[head.cellIndex].textContent.trim(), row]);
  const numeric = rows.every(([text]) => missing(text) || !Number.isNaN(number(text)));
  const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  rows.sort(([one], [other]) => missing(one) || missing(other) ? missing(one) - missing(other)
    : sign * (numeric ? number(one) - number(other) : one.localeCompare(other)));
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  body.append(...rows.map(([, row]) => row));
}
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => sort(button.parentElement));
}

// Menus of one label choose together.
const choices = [...document.querySelectorAll(".choice")];
function choose(label, name) {
  for (const choice of choices.filter(choice => choice.dataset.choice === label)) {
    const menu = choice.querySelector("select");
    if (![...menu.options].some(option => option.value === name)) continue;
    menu.value = name;
    for (const option of choice.querySelectorAll(":scope > .option")) option.hidden = option.dataset.option !== name;
  }
}
for (const choice of choices) {
  const menu = choice.querySelector("select");
  menu.closest("label").hidden = false;
  menu.addEventListener("change", () => choose(choice.dataset.choice, menu.value));
  choose(choice.dataset.choice, menu.value);
}

// Paper shows what is folded.
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  for (const details of opened) details.open = true;
});
addEventListener("afterprint", () => { for (const details of opened) details.open = false; });
