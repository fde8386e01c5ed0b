(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const narrow = window.matchMedia("(max-width: 40rem)");
  const PAPER = 680;  // pixels between the margins of A4 and of Letter
  let printing = false;
  const colors = () => {
    const style = getComputedStyle(document.documentElement);
    const line = printing ? "#bbb" : style.getPropertyValue("--line").trim();
    const ink = printing ? "#000" : style.getPropertyValue("--ink").trim();
    const axis = (a) => ({ ...a, gridcolor: line, zerolinecolor: line, linecolor: line });
    return { ink, axis };
  };
  const draw = (place) => {
    const { data, layout } = figures[place.dataset.figure];
    const { ink, axis } = colors();
    const themed = { ...layout, title: undefined, autosize: !printing,
      width: printing ? PAPER : undefined, font: { color: ink, size: narrow.matches ? 11 : 12 },
      xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis) };
    const bar = matchMedia("(hover: none)").matches ? false : "hover";
    Plotly.react(place, data, themed, { responsive: true, displaylogo: false, displayModeBar: bar });
  };
  const visible = (place) => !place.closest("details:not([open])");
  const all = () => [...document.querySelectorAll("[data-figure]")].filter(visible).forEach(draw);
  all();
  dark.addEventListener("change", all);
  // A figure that is unfolded is drawn then: before, it has no width.
  const folded = document.querySelectorAll("details");
  folded.forEach((d) => d.addEventListener("toggle", () => d.open && d.querySelectorAll("[data-figure]").forEach(draw)));
  // What a link points at is unfolded.
  const unfold = () => {
    const section = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    section?.querySelector(":scope > details")?.setAttribute("open", "");
  };
  window.addEventListener("hashchange", unfold);
  unfold();
  // On paper folded sections are open, figures as wide as a page; tables that repeat a figure stay out.
  let opened = [];
  window.addEventListener("beforeprint", () => {
    printing = true;
    opened = [...document.querySelectorAll("details.section:not([open])")];
    opened.forEach((d) => { d.open = true; });
    all();
  });
  window.addEventListener("afterprint", () => {
    printing = false;
    opened.forEach((d) => { d.open = false; });
    all();
  });
})();
