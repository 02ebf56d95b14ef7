"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("js");

  // Values on hover, on focus and on tap; arrow keys go from mark to mark, Escape closes.
  const tip = document.getElementById("tip");
  let shown = null, leaving = 0;
  const hide = () => {
    clearTimeout(leaving);
    if (shown) shown.classList.remove("near");
    shown = null;
    tip.hidden = true;
  };
  const show = (mark) => {
    hide();
    shown = mark;
    mark.classList.add("near");
    tip.textContent = mark.getAttribute("aria-label");
    tip.hidden = false;
    const box = mark.querySelector(".hit").getBoundingClientRect();
    const wide = tip.offsetWidth, high = tip.offsetHeight;
    const left = Math.min(Math.max(8, box.left + box.width / 2 - wide / 2), root.clientWidth - wide - 8);
    const above = box.top - high - 6;
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${(above > 4 ? above : box.bottom + 6) + scrollY}px`;
  };
  const leave = () => {
    clearTimeout(leaving);
    leaving = setTimeout(() => { if (shown !== document.activeElement) hide(); }, 150);
  };
  tip.addEventListener("pointerenter", () => clearTimeout(leaving));
  tip.addEventListener("pointerleave", leave);
  // Marks may lie over one another: the nearest to the pointer is meant.
  const away = (mark, x, y) => {
    const box = mark.querySelector(".hit").getBoundingClientRect();
    if (mark.querySelector(".bar")) return Math.hypot(Math.max(box.left - x, 0, x - box.right), Math.max(box.top - y, 0, y - box.bottom));
    return Math.hypot(x - box.left - box.width / 2, y - box.top - box.height / 2);
  };
  for (const chart of document.querySelectorAll("svg.chart")) {
    const marks = [...chart.querySelectorAll(".mark")];
    const at = (event) => {
      let best = null, least = 24;
      for (const mark of marks) {
        const distance = away(mark, event.clientX, event.clientY);
        if (distance < least) { best = mark; least = distance; }
      }
      if (!best) leave();
      else if (best !== shown) show(best);
      else clearTimeout(leaving);
    };
    chart.addEventListener("pointermove", at);
    chart.addEventListener("pointerdown", at);
    chart.addEventListener("pointerleave", leave);
    marks.forEach((mark, index) => {
      mark.querySelector("title").remove();
      mark.addEventListener("focus", () => show(mark));
      mark.addEventListener("blur", hide);
      mark.addEventListener("keydown", (event) => {
        const last = marks.length - 1;
        const to = { ArrowRight: index + 1, ArrowDown: index + 1, ArrowLeft: index - 1, ArrowUp: index - 1, Home: 0, End: last }[event.key];
        if (to === undefined) return;
        event.preventDefault();
        const next = marks[Math.min(Math.max(to, 0), last)];
        mark.tabIndex = -1;
        next.tabIndex = 0;
        next.focus();
      });
    });
  }
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

  // Sort by a click on a column's head.
  const value = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value.replace("inf", "Infinity"));
  };
  const order = (one, other) => {
    const numbers = typeof one === "number" && typeof other === "number";
    if (numbers) return one === other ? 0 : one - other;
    if (typeof one === "number") return -1;
    if (typeof other === "number") return 1;
    return one.localeCompare(other, "en", { numeric: true });
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const body = table.tBodies[0];
        const rows = [...body.rows].sort((one, other) => (down ? -1 : 1) * order(value(one, column), value(other, column)));
        body.append(...rows);
      });
    });
  }

  // Filter trials.
  const form = document.querySelector(".filters");
  if (form) {
    const rows = [...form.parentElement.querySelector("tbody").rows];
    const search = document.getElementById("filter-text");
    const choices = [...form.querySelectorAll("select")];
    const filter = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let count = 0;
      for (const row of rows) {
        const text = [...row.cells].map((cell) => cell.textContent.toLowerCase()).join(" ");
        const fits = words.every((word) => text.includes(word)) &&
          choices.every((choice) => choice.value === "" || row.cells[Number(choice.dataset.column)].textContent === choice.value);
        row.hidden = !fits;
        count += fits;
      }
      document.getElementById("shown").textContent = `${count} of ${rows.length} trials shown`;
    };
    for (const kind of ["input", "change"]) form.addEventListener(kind, filter);
    form.addEventListener("reset", () => setTimeout(filter));
    form.addEventListener("submit", (event) => event.preventDefault());
    filter();
  }

  // On paper everything is open.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    opened.forEach((one) => { one.open = true; });
  });
  addEventListener("afterprint", () => opened.forEach((one) => { one.open = false; }));
})();
