(() => {
  "use strict";
  const tip = document.getElementById("tip");
  const show = (x, y, lines, code) => {
    tip.replaceChildren();
    for (const line of lines) {
      const p = document.createElement("div");
      p.textContent = line;
      tip.append(p);
    }
    if (code) {
      const c = document.createElement("code");
      c.textContent = code;
      tip.append(c);
    }
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - box.width - 4)) + "px";
    tip.style.top = (y + 18 + box.height > innerHeight ? Math.max(4, y - box.height - 12) : y + 18) + "px";
  };
  const hide = () => { tip.hidden = true; };

  // A lane of marks is one stop of the Tab key; the arrows go through it.
  const tell = mark => {
    const box = mark.getBoundingClientRect();
    show(box.right, box.top, [mark.getAttribute("aria-label")], mark.dataset.line);
  };
  for (const lane of document.querySelectorAll(".lane")) {
    const marks = [...lane.querySelectorAll(".mark")];
    if (marks.length) marks[0].setAttribute("tabindex", "0");
    lane.addEventListener("keydown", event => {
      const move = { ArrowRight: 1, ArrowLeft: -1, Home: -marks.length, End: marks.length }[event.key];
      const at = marks.indexOf(document.activeElement);
      if (!move || at < 0) return;
      const next = marks[Math.max(0, Math.min(marks.length - 1, at + move))];
      marks[at].setAttribute("tabindex", "-1");
      next.setAttribute("tabindex", "0");
      next.focus();
      event.preventDefault();
      event.stopPropagation();
    });
    for (const mark of marks) {
      mark.addEventListener("mouseenter", () => tell(mark));
      mark.addEventListener("focus", () => tell(mark));
      mark.addEventListener("mouseleave", hide);
      mark.addEventListener("blur", hide);
    }
  }
  addEventListener("keydown", event => { if (event.key === "Escape") hide(); });

  // Read the curves: the points drawn are least and largest of their place, so a range is shown.
  const LEFT = 62, RIGHT = 960, TOP = 14, HEIGHT = 150;
  const plain = v => Number(v.toPrecision(4)).toString();
  for (const svg of document.querySelectorAll("svg.chart")) {
    const d = svg.dataset, x0 = +d.x0, x1 = +d.x1, y0 = +d.y0, y1 = +d.y1;
    const value = y => {
      const v = y0 + (y1 - y0) * (1 - (y - TOP) / HEIGHT);
      return d.log === "1" ? 10 ** v : v;
    };
    let curves = null, at = null;
    const cursor = document.createElementNS("http://www.w3.org/2000/svg", "path");
    cursor.setAttribute("class", "cursor");
    const read = (x, px, py) => {
      curves ??= [...svg.querySelectorAll(".read")].map(path => {
        const n = path.getAttribute("d").replace(/h\.1/g, "").match(/-?[\d.]+/g) || [];
        return [path.dataset.n, n.map(Number)];
      });
      at = Math.max(LEFT, Math.min(RIGHT, x));
      const lines = ["step " + Math.round(x0 + (x1 - x0) * (at - LEFT) / (RIGHT - LEFT)).toLocaleString("en")];
      for (const [name, n] of curves) {
        let nearest = Infinity;
        for (let i = 0; i < n.length; i += 2) nearest = Math.min(nearest, Math.abs(n[i] - at));
        if (nearest > 12) continue;
        let low = Infinity, high = -Infinity;
        for (let i = 0; i < n.length; i += 2) if (Math.abs(n[i] - at) <= nearest + 1) {
          low = Math.min(low, value(n[i + 1]));
          high = Math.max(high, value(n[i + 1]));
        }
        lines.push(name + ": " + plain(low) + (plain(low) === plain(high) ? "" : " to " + plain(high)));
      }
      cursor.setAttribute("d", `M${at} ${TOP}v${HEIGHT}`);
      svg.append(cursor);
      show(px, py, lines);
    };
    const leave = () => { cursor.remove(); hide(); };
    svg.setAttribute("tabindex", "0");
    svg.addEventListener("mousemove", event => {
      if (event.target.classList.contains("mark")) return;
      const box = svg.getBoundingClientRect();
      read((event.clientX - box.left) / box.width * 1000, event.clientX, event.clientY);
    });
    svg.addEventListener("mouseleave", leave);
    svg.addEventListener("blur", leave);
    svg.addEventListener("keydown", event => {
      const move = { ArrowRight: 9, ArrowLeft: -9 }[event.key];
      if (!move || event.target !== svg) return;
      const box = svg.getBoundingClientRect(), x = (at ?? LEFT) + move;
      read(x, box.left + x / 1000 * box.width, box.top);
      event.preventDefault();
    });
  }
})();
