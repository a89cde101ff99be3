"use strict";
// Everything the page needs is in it: no request is made, and no text is ever parsed as markup.
const state = JSON.parse(document.getElementById("state").textContent);
const all = (query, root = document) => [...root.querySelectorAll(query)];
const number = (n) => n.toLocaleString("en-US");

function percent(part, whole) {
  if (!whole) return "-";
  const share = part / whole;
  if (share > 0 && share < 0.001) return "<0.1%";
  return share > 0.999 && share < 1 ? ">99.9%" : (100 * share).toFixed(1) + "%";
}

// ---- threshold

const slider = document.getElementById("threshold");

function move() {
  const i = Number(slider.value), shown = state.grid[i], place = (100 * Number(shown)).toFixed(3) + "%";
  slider.setAttribute("aria-valuetext", shown);
  document.getElementById("at").textContent = shown;
  document.getElementById("select-command").textContent = state.command + shown;
  for (const element of all("[data-at]")) element.textContent = shown;
  for (const cell of all("[data-kept]")) cell.textContent = number(state.kept[cell.dataset.kept][i]);
  for (const cell of all("[data-share]")) {
    const what = cell.dataset.share;
    cell.textContent = percent(state.kept[what][i], state.totals[what]);
  }
  for (const shade of all("[data-cut=width]")) shade.setAttribute("width", place);
  for (const line of all("[data-cut=line]")) {
    line.setAttribute("x1", place);
    line.setAttribute("x2", place);
  }
}

slider.addEventListener("input", move);
slider.closest("[hidden]").hidden = false;

// ---- copy

for (const button of all("[data-copy]")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const code = document.getElementById(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "copied";
    } catch {  // a page from disk may not be allowed to: select it, for the person to copy
      getSelection().selectAllChildren(code);
      button.textContent = "selected";
    }
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  });
}

// ---- tabs

for (const group of all("[data-tabs]")) {
  const panels = all(":scope > [data-tab]", group);
  const list = document.createElement("div");
  list.setAttribute("role", "tablist");
  list.setAttribute("aria-label", group.getAttribute("aria-label"));
  const tabs = panels.map((panel) => {
    const tab = document.createElement("button"), badge = document.createElement("span");
    tab.type = "button";
    tab.id = "tab-" + panel.id;
    tab.textContent = panel.dataset.tab + " ";
    badge.className = "badge";
    badge.textContent = panel.dataset.count;
    tab.append(badge);
    tab.setAttribute("role", "tab");
    tab.setAttribute("aria-controls", panel.id);
    panel.setAttribute("role", "tabpanel");
    panel.setAttribute("aria-labelledby", tab.id);
    panel.tabIndex = 0;
    list.append(tab);
    return tab;
  });
  const open = (chosen) => tabs.forEach((tab, i) => {
    tab.setAttribute("aria-selected", String(i === chosen));
    tab.tabIndex = i === chosen ? 0 : -1;
    panels[i].hidden = i !== chosen;
  });
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => open(i));
    tab.addEventListener("keydown", (event) => {
      const last = tabs.length - 1;
      const next = { ArrowRight: i === last ? 0 : i + 1, ArrowLeft: i ? i - 1 : last, Home: 0, End: last }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      open(next);
      tabs[next].focus();
    });
  });
  group.prepend(list);
  group.classList.add("tabbed");
  open(0);
}

// ---- verdicts: "row source" -> keep, drop or unsure

const place = "capfilt-verdicts-" + state.name;
let verdicts = {};
try {
  verdicts = JSON.parse(localStorage.getItem(place)) || {};
} catch { /* no storage here: verdicts live as long as the page */ }

function show() {
  for (const button of all("[data-verdict]")) {
    const word = verdicts[button.dataset.row + " " + button.dataset.source];
    button.setAttribute("aria-pressed", String(word === button.dataset.verdict));
  }
  const judged = (source) => Object.keys(verdicts).filter((name) => name.endsWith(" " + source)).length;
  const total = Object.keys(verdicts).length;
  document.getElementById("progress").textContent =
    `${total} texts judged: ${judged("web")} web, ${judged("synthetic")} synthetic`;
  document.getElementById("download").disabled = document.getElementById("forget").disabled = total === 0;
}

function remember() {
  try {
    localStorage.setItem(place, JSON.stringify(verdicts));
  } catch { /* as above */ }
  show();
}

for (const button of all("[data-verdict]")) {
  button.addEventListener("click", () => {
    const name = button.dataset.row + " " + button.dataset.source;
    if (verdicts[name] === button.dataset.verdict) delete verdicts[name];
    else verdicts[name] = button.dataset.verdict;
    remember();
  });
}

document.getElementById("download").addEventListener("click", () => {
  const list = Object.entries(verdicts).map(([name, verdict]) => {
    const [row, source] = name.split(" ");
    return { key: state.keys[Number(row)], source, verdict };
  });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(list, null, 1) + "\n"], { type: "application/json" }));
  link.download = "verdicts.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
});

document.getElementById("forget").addEventListener("click", () => {
  if (!confirm("Forget all verdicts on this page?")) return;
  verdicts = {};
  remember();
});

for (const hidden of all(".judge-tools, .verdicts")) hidden.hidden = false;
show();
