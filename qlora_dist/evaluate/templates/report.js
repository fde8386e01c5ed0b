(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const colors = () => {
    const style = getComputedStyle(document.documentElement);
    const line = style.getPropertyValue("--line").trim();
    const ink = style.getPropertyValue("--ink").trim();
    const axis = (a) => ({ ...a, gridcolor: line, zerolinecolor: line, linecolor: line });
    return { ink, axis };
  };
  const draw = (place) => {
    const { data, layout } = figures[place.dataset.figure];
    const { ink, axis } = colors();
    const themed = { ...layout, title: undefined, font: { color: ink }, xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis) };
    const bar = matchMedia("(hover: none)").matches ? false : "hover";
    Plotly.react(place, data, themed, { responsive: true, displaylogo: false, displayModeBar: bar });
  };
  const all = () => document.querySelectorAll("[data-figure]").forEach(draw);
  all();
  dark.addEventListener("change", all);
  // What is folded on the screen is open on paper.
  const folded = document.querySelectorAll("details");
  window.addEventListener("beforeprint", () => folded.forEach((d) => { d.open = true; }));
})();
