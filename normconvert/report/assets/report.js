"use strict";
// Draws the charts described in #charts; colours come from the style sheet, so that they follow the theme.
(() => {
  const data = JSON.parse(document.getElementById("charts").textContent);
  const FLOOR = 1e-18;
  const narrow = () => window.innerWidth < 600;
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const number = (value) => (value <= FLOOR ? "0" : value >= 0.001 && value < 1000 ? String(+value.toPrecision(3)) : value.toExponential(1));
  const power = (value) => {
    const exponent = Math.log10(value);
    return Math.abs(exponent - Math.round(exponent)) < 1e-6 ? `1e${Math.round(exponent)}` : null;
  };
  const looks = {
    native: { colour: "native", dash: [], fill: false, points: 3, order: 0 },
    algebra: { colour: "algebra", dash: [], fill: false, points: 3, order: 1 },
    noise: { colour: "noise", dash: [6, 4], fill: "origin", points: 2, order: 2 },
    unit: { colour: "noise", dash: [2, 3], fill: false, points: 0, order: 3 },
  };
  // The end of a name tells layers apart; the tooltip has all of it.
  const tail = (name) => {
    const room = narrow() ? 11 : 18;
    return name.length > room ? `…${name.slice(1 - room)}` : name;
  };

  const dataset = (series) => {
    const look = looks[series.role];
    const line = colour(look.colour);
    return {
      label: series.name,
      data: series.values,
      borderColor: line,
      backgroundColor: look.fill ? `${line}1f` : line,
      borderDash: look.dash,
      borderWidth: look.points ? 2 : 1,
      fill: look.fill,
      order: look.order,
      pointRadius: look.points,
      pointHitRadius: 12,
      pointBackgroundColor: line,
      maxBarThickness: 28,
      tension: 0,
    };
  };

  const draw = (id, chart) => {
    const text = colour("faint");
    const grid = { color: colour("line") };
    const linear = chart.kind === "bar" || chart.scale === "linear";
    const values = chart.series.flatMap((series) => series.values).filter((value) => value !== null);
    return new Chart(document.getElementById(id), {
      type: chart.kind,
      data: { labels: chart.labels, datasets: chart.series.map(dataset) },
      options: {
        animation: false,
        responsive: true,
        maintainAspectRatio: false,
        interaction: { mode: "index", intersect: false },
        scales: {
          x: {
            grid,
            ticks: { color: text, autoSkip: true, maxRotation: 60, minRotation: narrow() && chart.kind === "bar" ? 45 : 0, callback: (value, index) => (chart.kind === "bar" ? chart.labels[index] : tail(chart.labels[index])) },
          },
          y: {
            ...(linear
              ? { type: "linear", beginAtZero: true }
              : { type: "logarithmic", min: Math.min(...values) / 2, max: Math.max(...values) * 2 }),
            grid,
            ticks: { color: text, autoSkip: true, maxTicksLimit: 12, ...(linear ? {} : { callback: power }) },
          },
        },
        plugins: {
          legend: { position: "bottom", align: "start", labels: { color: text, boxWidth: narrow() ? 18 : 28, boxHeight: 0 } },
          tooltip: {
            callbacks: {
              title: (items) => chart.names[items[0].dataIndex],
              label: (item) => `${item.dataset.label}: ${number(item.raw)}`,
            },
          },
        },
      },
    });
  };

  let drawn = [];
  const all = () => {
    drawn.forEach((chart) => chart.destroy());
    drawn = Object.entries(data).map(([id, chart]) => draw(id, chart));
  };
  all();
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
})();
