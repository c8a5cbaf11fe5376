"use strict";
(() => {
  const plots = [...document.querySelectorAll(".plot")];
  const options = { displayModeBar: false, responsive: true, showTips: false };
  for (const fold of document.querySelectorAll("details.behind")) fold.open = false;
  for (const plot of plots) {
    const figure = JSON.parse(document.getElementById(`${plot.id}-figure`).textContent);
    Plotly.newPlot(plot, figure.data, figure.layout, options);
  }
  // a printed page is narrower than a window, and its figures must be drawn for it before it is
  const pageWidth = 665;
  addEventListener("beforeprint", () => {
    for (const plot of plots) {
      const width = plot.closest(".maps") ? (pageWidth - 28) / 2 : pageWidth;
      Plotly.relayout(plot, { width, autosize: false });
    }
  });
  addEventListener("afterprint", () => {
    for (const plot of plots) Plotly.relayout(plot, { width: null, autosize: true });
  });
})();
