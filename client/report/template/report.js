"use strict";
// Shows what both models held likely at the token under the pointer, the finger or the keyboard's focus.
// All text goes in as text nodes: nothing that a model said becomes markup.

function element(name, text, style) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (style) made.className = style;
  return made;
}

function detailOf(step) {
  const made = document.createDocumentFragment();
  const heading = element("p");
  heading.append("step " + step.t + ": ", element("code", step.token), " ", element("b", step.kl + " nats"));
  made.append(heading, element("p", step.why + "; covered mass " + step.mass, "small"));
  const table = element("table");
  const head = element("tr");
  for (const title of ["token", "expert", "amateur", "label"]) {
    const cell = element("th", title);
    cell.scope = "col";
    head.append(cell);
  }
  table.append(element("thead"), element("tbody"));
  table.tHead.append(head);
  for (const [token, expert, amateur, label, taken, plausible] of step.rows) {
    const row = element("tr", undefined, (taken ? "taken " : "") + (plausible ? "" : "outside"));
    const name = element("th");
    name.scope = "row";
    name.append(element("code", token), taken ? " ←" : "");
    row.append(name, element("td", expert), element("td", amateur), element("td", label));
    table.tBodies[0].append(row);
  }
  made.append(table);
  const less = step.rest ? "and " + step.rest + " less likely; " : "";
  made.append(element("p", less + "bold ← was taken; grey is not plausible", "small"));
  return made;
}

for (const article of document.querySelectorAll(".trajectory")) {
  const steps = JSON.parse(article.querySelector("script").textContent);
  const tokens = [...article.querySelectorAll(".tokens span")];
  const detail = article.querySelector(".detail");
  let current = -1;

  const show = (index) => {
    if (index === current) return;
    if (current >= 0) tokens[current].setAttribute("aria-selected", "false");
    current = index;
    tokens[index].setAttribute("aria-selected", "true");
    detail.replaceChildren(detailOf(steps[index]));
    detail.scrollTop = 0;
  };
  const focus = (index) => {
    for (const token of tokens) token.tabIndex = -1;
    tokens[index].tabIndex = 0;
    tokens[index].focus();
  };
  const keptFrom = (index, way) => {
    for (let at = index + way; at >= 0 && at < tokens.length; at += way) {
      if (tokens[at].classList.contains("kept")) return at;
    }
    return index;
  };
  const moves = {
    ArrowRight: (index) => index + 1, ArrowLeft: (index) => index - 1,
    ArrowDown: (index) => index + 1, ArrowUp: (index) => index - 1,
    Home: () => 0, End: () => tokens.length - 1,
    PageDown: (index) => keptFrom(index, 1), PageUp: (index) => keptFrom(index, -1),
  };

  tokens.forEach((token, index) => {
    token.addEventListener("mouseenter", () => show(index));
    token.addEventListener("focus", () => show(index));
    token.addEventListener("click", () => focus(index));
    token.addEventListener("keydown", (event) => {
      const move = moves[event.key];
      if (!move || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      focus(Math.min(Math.max(move(index), 0), tokens.length - 1));
    });
  });
  // Something to see before anything is pointed at, where there is room for it beside the text.
  const first = tokens.findIndex((token) => token.classList.contains("kept"));
  if (matchMedia("(min-width: 50.01rem)").matches && tokens.length) show(first < 0 ? 0 : first);
}
