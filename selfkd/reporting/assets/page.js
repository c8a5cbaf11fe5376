"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const make = (name, text = "") => Object.assign(document.createElement(name), { textContent: text });
  for (const fold of all("details.behind")) fold.open = false;

  // --- what a mark stands for, where it is pointed at or tapped ---
  const tip = document.body.appendChild(Object.assign(make("div"), { id: "tip" }));
  for (const title of all(".plot title")) {
    const mark = title.parentNode;
    mark.setAttribute(mark.classList.contains("plot") ? "aria-label" : "data-tip", title.textContent);
    title.remove();
  }
  addEventListener("pointermove", point);
  addEventListener("pointerdown", point);
  addEventListener("scroll", () => { tip.textContent = ""; }, { passive: true });
  function point(event) {
    const mark = event.target.closest?.("[data-tip]");
    tip.textContent = mark ? mark.dataset.tip : "";
    if (!mark) return;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 12, innerWidth - box.width - 4))}px`;
    tip.style.top = `${Math.max(4, event.clientY - box.height - 12)}px`;
  }

  // --- figures as files ---
  const SVG = "http://www.w3.org/2000/svg";
  const element = (name, attributes) => {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };
  const LENGTHS = ["x", "y", "width", "height", "cx", "cy", "x1", "x2", "y1", "y2"];
  function fixed(drawing) {  // a copy that needs no page: lengths in pixels, styles beside it
    const frame = drawing.getBoundingClientRect();
    const around = 12, [width, height] = [frame.width, frame.height].map(side => Math.ceil(side) + 2 * around);
    const corner = { x: -around, y: -around, width, height };
    const svg = element("svg", { xmlns: SVG, width, height, viewBox: Object.values(corner).join(" ") });
    const look = getComputedStyle(document.documentElement);
    const text = document.getElementById("figure-style").textContent.replace(/@media[^{]*\{(?:[^{}]*\{[^{}]*\})*[^{}]*\}/g, "");
    const names = [...new Set(text.match(/--[\w-]+(?=:)/g))].filter(name => name !== "--c");
    const values = names.map(name => `${name}:${look.getPropertyValue(name)}`).join(";");
    const style = element("style", {});
    style.textContent = `${text} :root{${values}} svg{overflow:visible} .plot{padding:0!important} polyline{vector-effect:none!important}`;
    svg.append(style, element("rect", { ...corner, fill: look.getPropertyValue("--paper") }));
    for (const entry of all(".legend span", drawing)) {
      const box = entry.getBoundingClientRect(), y = box.top - frame.top + box.height / 2;
      const colour = getComputedStyle(entry.firstChild);
      const fill = entry.firstChild.className === "dotted" ? colour.borderTopColor : colour.backgroundColor;
      svg.append(element("circle", { cx: box.left - frame.left + 5, cy: y, r: 5, style: `fill:${fill}` }));
      const label = element("text", { x: box.left - frame.left + 16, y: y + 4, style: `font:12px sans-serif;fill:${look.getPropertyValue("--soft")}` });
      label.textContent = entry.textContent;
      svg.append(label);
    }
    for (const plot of all(".plot", drawing)) {
      const copy = plot.cloneNode(true), box = plot.getBoundingClientRect(), own = getComputedStyle(plot);
      const live = [plot, ...all("*", plot)];
      [copy, ...all("*", copy)].forEach((node, place) => {
        for (const key of LENGTHS)
          if (node.getAttribute(key)?.endsWith("%")) node.setAttribute(key, live[place][key].baseVal.value ?? live[place][key].baseVal[0].value);
        if (node.localName === "polyline") {  // drawn in thousandths of the width
          const scale = live[place].parentNode.width.baseVal.value / 1000;
          node.setAttribute("points", node.getAttribute("points").replace(/(\S+),/g, (_, x) => `${(x * scale).toFixed(1)},`));
          node.parentNode.removeAttribute("viewBox");
        }
        if (node.dataset.tip) node.append(Object.assign(element("title", {}), { textContent: node.dataset.tip }));
      });
      const [left, top] = [parseFloat(own.paddingLeft), parseFloat(own.paddingTop)];
      copy.removeAttribute("style");
      copy.setAttribute("x", box.left - frame.left + left);
      copy.setAttribute("y", box.top - frame.top + top);
      copy.setAttribute("width", box.width - left - parseFloat(own.paddingRight));
      copy.setAttribute("height", box.height - top - parseFloat(own.paddingBottom));
      copy.style.cssText = `width:${copy.getAttribute("width")}px;height:${copy.getAttribute("height")}px`;
      svg.append(copy);
    }
    return { svg: new XMLSerializer().serializeToString(svg), width, height };
  }
  function save(address, name) {
    Object.assign(make("a"), { href: address, download: name }).click();
  }
  const address = text => `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
  async function savePng(drawing, name) {
    const { svg, width, height } = fixed(drawing), image = new Image(), scale = 3;
    image.src = address(svg);
    await image.decode();
    const canvas = Object.assign(make("canvas"), { width: width * scale, height: height * scale });
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    save(canvas.toDataURL("image/png"), name);
  }

  // --- tables as text ---
  const cells = table => all("tr", table).map(row => all("th, td", row).map(cell => cell.textContent.trim()));
  const isText = table => table.classList.contains("texts");
  function markdown(table) {
    const [head, ...rows] = cells(table).map(row => row.map(cell => cell.replace(/[\\|`*_<>]/g, "\\$&")));
    const line = row => `| ${row.join(" | ")} |`;
    const rule = head.map((_, place) => (place && !isText(table) ? "--:" : ":--"));
    return [head, rule, ...rows].map(line).join("\n") + "\n";
  }
  const TEX = { "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "±": "$\\pm$", "−": "$-$", "→": "$\\to$", "<": "$<$", ">": "$>$" };
  function latex(table) {
    const [head, ...rows] = cells(table).map(row => row.map(cell => cell.replace(/[\\~^±−→<>&%$#_{}]/g, sign => TEX[sign] ?? `\\${sign}`).replace(/(?<![\w.])-(?=\d)/g, "$$-$$")));
    const line = row => `  ${row.join(" & ")} \\\\`;
    const columns = head.map((_, place) => (place && !isText(table) ? "r" : "l")).join("");
    return [`\\begin{tabular}{${columns}}`, "  \\toprule", line(head), "  \\midrule", ...rows.map(line), "  \\bottomrule", "\\end{tabular}", ""].join("\n");
  }
  async function copy(text) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {  // no permission, or no secure page
      const area = document.body.appendChild(make("textarea", text));
      area.select();
      document.execCommand("copy");
      area.remove();
    }
  }

  // --- buttons ---
  function tools(after, buttons) {
    const row = Object.assign(make("div"), { className: "tools" });
    for (const [name, what, act] of buttons) {
      const button = Object.assign(make("button", name), { type: "button", title: what });
      button.setAttribute("aria-label", what);
      button.addEventListener("click", async () => {
        await act();
        button.textContent = "✓";
        setTimeout(() => { button.textContent = name; }, 1200);
      });
      row.append(button);
    }
    after.after(row);
  }
  for (const drawing of all("figure .drawing")) {
    const title = drawing.closest("figure").querySelector("h3").textContent;
    const name = title.toLowerCase().replace(/[^a-z0-9]+/g, "-");
    tools(drawing, [
      ["SVG", `Save the figure ${title} as SVG`, () => save(address(fixed(drawing).svg), `${name}.svg`)],
      ["PNG", `Save the figure ${title} as PNG`, () => savePng(drawing, `${name}.png`)],
    ]);
  }
  for (const table of all("table")) {
    const title = table.caption.textContent;
    tools(table.parentNode, [
      ["Markdown", `Copy the table ${title} as Markdown`, () => copy(markdown(table))],
      ["LaTeX", `Copy the table ${title} as LaTeX`, () => copy(latex(table))],
    ]);
  }
  for (const code of all("pre")) tools(code, [["Copy", "Copy this text", () => copy(code.textContent)]]);
})();
