"use strict";
// Draws the charts and the table of rollouts from the JSON in the page. All text becomes text: nothing here is parsed as HTML.
const DATA = JSON.parse(document.getElementById("data").textContent);
// ------------------------------------------------------------------ charts

async function drawChart(figure, chart) {
  const place = figure.querySelector(".chart");
  const slider = figure.querySelector(".slider input");
  const buttons = [...figure.querySelectorAll(".views button")];
  let shown = null;

  function move() {
    const step = chart.slider[Number(slider.value)];
    figure.querySelector(".slider output").textContent = step.toLocaleString("en");
    shown.view.signal("at", step).run();
  }

  async function show(spec) {
    if (shown) shown.finalize();
    const full = { ...spec, datasets: { ...pick(spec), ...spec.datasets } };
    // `ast` has expressions interpreted: the page's policy forbids code made from text.
    shown = await vegaEmbed(place, full, { mode: "vega-lite", renderer: "svg", actions: false, ast: true, config: DATA.look });
  }

  const views = Object.values(chart.views);
  buttons.forEach((button, number) => button.addEventListener("click", async () => {
    buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
    await show(views[number]);
  }));
  await show(views[0]);
  if (slider) slider.addEventListener("input", move);
}

// The sets of rows that a specification names; few and small ones of its own it brings along.
function pick(spec, found = {}) {
  if (spec && typeof spec === "object") {
    if (spec.data && spec.data.name in DATA.rows) found[spec.data.name] = DATA.rows[spec.data.name];
    Object.values(spec).forEach((part) => pick(part, found));
  }
  return found;
}

async function drawCharts() {
  for (const chart of DATA.charts) {
    const figure = document.getElementById(chart.name);
    try {
      await drawChart(figure, chart);
    } catch (error) {
      console.error(chart.name, error);
      figure.querySelector(".chart").textContent = "This chart could not be drawn: " + error.message;
    }
  }
  document.documentElement.dataset.drawn = "yes";
}

// ------------------------------------------------------------------ rollouts

const PAGE = 20; // rollouts shown at a time

function element(name, text, className) {
  const made = document.createElement(name);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

function number(value, digits, sign) {
  if (value === null || value === undefined) return "–";
  return (sign && value > 0 ? "+" : "") + value.toFixed(digits);
}

function rolloutRow(rollout) {
  const row = document.createElement("tr");
  const outcome = rollout.fault || rollout.outcome;
  const cells = [
    ["", element("span", outcome, rollout.outcome)],
    ["step", element("span", rollout.step.toLocaleString("en"))],
    ["believed", element("span", rollout.belief === null ? "–" : (100 * rollout.belief).toFixed(0) + "%")],
    ["count", element("span", String(rollout.count))],
    ["reward", element("span", number(rollout.reward, 2))],
    ["advantage", element("span", number(rollout.advantage, 2, true))],
    ["tokens", element("span", rollout.length.toLocaleString("en"))],
    ["prompt", element("div", rollout.prompt, "text")],
    ["response", element("div", rollout.response, "text")],
  ];
  if (rollout.answer) cells[7][1].append(element("div", "answer: " + rollout.answer, "gold"));
  if (rollout.reason) cells[8][1].append(element("div", "no reward: " + rollout.reason, "gold"));
  if (DATA.runs.length > 1) {
    const swatch = element("i", "", "swatch");
    swatch.style.background = DATA.colours[rollout.run];
    swatch.title = DATA.runs[rollout.run];
    cells[0][1].prepend(swatch);
  }
  for (const [name, inside] of cells) {
    const cell = document.createElement("td");
    if (name) cell.dataset.name = name;
    cell.append(inside);
    row.append(cell);
  }
  return row;
}

function showRollouts() {
  const section = document.getElementById("rollouts");
  const form = section.querySelector("form");
  if (!form) return;
  const body = section.querySelector("tbody");
  const said = section.querySelector(".pages output");
  const [back, on] = section.querySelectorAll(".pages button");
  let page = 0;

  const steps = [...new Set(DATA.rollouts.map((rollout) => rollout.step))].sort((a, b) => a - b);
  for (const step of steps) form.step.append(new Option(step.toLocaleString("en"), step));
  if (form.run) DATA.runs.forEach((label, at) => form.run.append(new Option(label, at)));

  function matches(rollout) {
    if (form.run && form.run.value && rollout.run !== Number(form.run.value)) return false;
    if (form.step.value && rollout.step !== Number(form.step.value)) return false;
    if (form.outcome.value && rollout.outcome !== form.outcome.value) return false;
    if (form.belief.value) {
      const [low, high] = form.belief.value.split(" ").map(Number);
      if (rollout.belief === null || rollout.belief < low || rollout.belief >= high) return false;
    }
    const text = form.text.value.toLowerCase();
    return !text || [rollout.prompt, rollout.answer, rollout.response].some((part) => part.toLowerCase().includes(text));
  }

  function show() {
    const found = DATA.rollouts.filter(matches);
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    page = Math.min(page, pages - 1);
    body.replaceChildren(...found.slice(page * PAGE, (page + 1) * PAGE).map(rolloutRow));
    said.textContent = found.length ? `${found.length} rollouts, page ${page + 1} of ${pages}` : "no rollout is like that";
    back.disabled = page === 0;
    on.disabled = page === pages - 1;
  }

  form.addEventListener("input", () => { page = 0; show(); });
  form.addEventListener("submit", (event) => event.preventDefault());
  back.addEventListener("click", () => { page -= 1; show(); });
  on.addEventListener("click", () => { page += 1; show(); });
  show();
}

showRollouts();
drawCharts();
