// What is wrong with the page that is shown: a list of sentences, empty where nothing is.
// Evaluated by tests/support/pages.py; pages themselves never hold it.
(() => {
  const SLACK = 1; // pixels: edges are rounded
  const LEAST_CONTRAST = 4.5; // WCAG 2.2, 1.4.3
  const LEAST_SIZE = 9; // pixels
  const short = (text) => JSON.stringify(text.trim().replace(/\s+/g, " ").slice(0, 40));

  // -- texts and where they are: one entry a text node, with a box for each of its lines --------------------------------

  const shown = (element) =>
    element.checkVisibility({ contentVisibilityAuto: true, opacityProperty: true, visibilityProperty: true });

  function texts() {
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
      const element = node.parentElement;
      if (!node.data.trim() || element.closest("script, style, title, desc, defs, option") || !shown(element)) continue;
      const range = document.createRange();
      range.selectNodeContents(node);
      const boxes = [...range.getClientRects()].filter((box) => box.width > 0.5 && box.height > 0.5);
      if (boxes.length) found.push({ node, element, boxes, text: short(node.data), svg: element.ownerSVGElement });
    }
    return found;
  }

  const scrolls = (element) => ["auto", "scroll"].includes(getComputedStyle(element).overflowX);
  function scroller(element) {
    for (let one = element; one && one !== document.body; one = one.parentElement) if (scrolls(one)) return one;
    return null;
  }

  // -- geometry ---------------------------------------------------------------------------------------------------------

  function overlaps(all) {
    const said = new Set();
    const boxes = all.flatMap((one) => one.boxes.map((box) => ({ one, box, scroller: scroller(one.element) })));
    boxes.sort((a, b) => a.box.top - b.box.top);
    boxes.forEach((first, at) => {
      for (let next = at + 1; next < boxes.length; next++) {
        const second = boxes[next];
        if (second.box.top >= first.box.bottom - SLACK) break;
        if (first.one === second.one || first.scroller !== second.scroller) continue;
        const wide = Math.min(first.box.right, second.box.right) - Math.max(first.box.left, second.box.left);
        const high = Math.min(first.box.bottom, second.box.bottom) - second.box.top;
        if (wide > SLACK && high > SLACK)
          said.add(`${first.one.text} and ${second.one.text} overlap by ${wide.toFixed(1)} x ${high.toFixed(1)} px`);
      }
    });
    return [...said];
  }

  function clipOf(element, box) {
    // The rectangle that an SVG clip-path leaves, on the screen; charts clip by rectangles alone.
    const rect = document.querySelector(getComputedStyle(element).clipPath.match(/#[^")]+/)?.[0] ?? "none")?.querySelector("rect");
    if (!rect) return box;
    const { x, y, width, height } = rect;
    const [left, top] = [x.baseVal.value, y.baseVal.value];
    const corners = [new DOMPoint(left, top), new DOMPoint(left + width.baseVal.value, top + height.baseVal.value)];
    const [from, to] = corners.map((corner) => corner.matrixTransform(element.getScreenCTM()));
    return { left: from.x, top: from.y, right: to.x, bottom: to.y };
  }

  const inside = (box, frame) =>
    box.left >= frame.left - SLACK && box.right <= frame.right + SLACK && box.top >= frame.top - SLACK && box.bottom <= frame.bottom + SLACK;

  function cutBy(one) {
    // What cuts a text: an edge of the drawing, a clip, a box that hides what is too large, or the edge of the page.
    const box = (number) => one.boxes[number];
    for (let number = 0; number < one.boxes.length; number++) {
      if (one.svg && !inside(box(number), one.svg.getBoundingClientRect())) return "its drawing";
      for (let up = one.element; up && up !== document.body; up = up.parentElement) {
        const style = getComputedStyle(up);
        if (one.svg?.contains(up) && style.clipPath !== "none" && !inside(box(number), clipOf(up, box(number)))) return "a clip";
        if (one.svg?.contains(up)) continue;
        const frame = up.getBoundingClientRect();
        if (["hidden", "clip"].includes(style.overflowX) && !inside(box(number), frame)) return `<${up.localName}>`;
        if (scrolls(up)) {
          const start = frame.left - up.scrollLeft;
          if (box(number).left < start - SLACK || box(number).right > start + up.scrollWidth + SLACK) return "its scrolling region";
          break;
        }
      }
      const width = document.documentElement.clientWidth;
      if (!scroller(one.element) && (box(number).left < -SLACK || box(number).right > width + SLACK)) return "the page";
    }
    return "";
  }

  const cut = (all) => all.map((one) => [one, cutBy(one)]).filter(([, by]) => by).map(([one, by]) => `${one.text} sticks out of ${by}`);

  function tooWide() {
    const { scrollWidth, clientWidth } = document.documentElement;
    return scrollWidth > clientWidth ? [`the page is ${scrollWidth} px wide on a screen of ${clientWidth}`] : [];
  }

  function small(all) {
    const size = (one) => {
      const scale = one.svg ? Math.hypot(one.element.getScreenCTM().a, one.element.getScreenCTM().b) : 1;
      return parseFloat(getComputedStyle(one.element).fontSize) * scale;
    };
    return all.filter((one) => size(one) < LEAST_SIZE).map((one) => `${one.text} is ${size(one).toFixed(1)} px high`);
  }

  // -- contrast ---------------------------------------------------------------------------------------------------------

  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const known = new Map();
  function colour(text) {
    // (red, green, blue) from 0 to 255 and alpha from 0 to 1 of any CSS colour.
    if (!known.has(text)) {
      canvas.clearRect(0, 0, 1, 1);
      canvas.fillStyle = text;
      canvas.fillRect(0, 0, 1, 1);
      const [red, green, blue, alpha] = canvas.getImageData(0, 0, 1, 1).data;
      known.set(text, [red, green, blue, alpha / 255]);
    }
    return known.get(text);
  }
  const over = ([r, g, b, a], below) => [r, g, b].map((part, at) => part * a + below[at] * (1 - a));
  function paper(element) {
    const layers = [];
    for (let up = element; up; up = up.parentElement) {
      const layer = colour(getComputedStyle(up).backgroundColor);
      if (layer[3]) layers.unshift(layer);
    }
    return layers.reduce((below, layer) => over(layer, below), [255, 255, 255]);
  }
  function luminance(rgb) {
    const [r, g, b] = rgb.map((part) => (part / 255 <= 0.04045 ? part / 255 / 12.92 : ((part / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }
  function contrast(one) {
    const style = getComputedStyle(one.element);
    const haloed = one.svg && style.paintOrder.startsWith("stroke") && style.stroke !== "none";
    const below = haloed ? over(colour(style.stroke), paper(one.svg)) : paper(one.svg ?? one.element);
    const ink = over(colour(one.svg ? style.fill : style.color), below);
    const [bright, dark] = [luminance(ink), luminance(below)].sort((a, b) => b - a);
    return (bright + 0.05) / (dark + 0.05);
  }
  const pale = (all) =>
    all.filter((one) => contrast(one) < LEAST_CONTRAST).map((one) => `${one.text} has a contrast of ${contrast(one).toFixed(2)}`);

  // -- structure --------------------------------------------------------------------------------------------------------

  const every = (selector) => [...document.querySelectorAll(selector)];
  const tag = (element) => element.cloneNode(false).outerHTML.slice(0, 80);
  const faulty = (selector, isFaulty, what) => every(selector).filter(isFaulty).map((one) => `${tag(one)} ${what}`);

  function name(element) {
    const labels = (element.getAttribute("aria-labelledby") ?? "").split(/\s+/).filter(Boolean);
    const text = labels.map((id) => document.getElementById(id)?.textContent ?? "").join(" ");
    return (text || element.getAttribute("aria-label") || [...(element.labels ?? [])].map((one) => one.textContent).join(" ")).trim();
  }
  function headings() {
    const levels = every("h1, h2, h3, h4, h5, h6").map((one) => Number(one.localName[1]));
    const found = levels.filter((level) => level === 1).length === 1 ? [] : ["there is not one h1"];
    levels.forEach((level, at) => level > (levels[at - 1] ?? 0) + 1 && found.push(`an h${level} follows an h${levels[at - 1] ?? 0}`));
    return found;
  }
  function ids() {
    const all = every("[id]").map((one) => one.id);
    const found = all.filter((id, at) => all.indexOf(id) !== at).map((id) => `the id ${id} is there twice`);
    const known = new Set(all);
    for (const element of every("*"))
      for (const { name, value } of element.attributes) {
        const asked = /^(aria-(labelledby|describedby|controls|owns|details)|for|list|headers)$/.test(name)
          ? value.split(/\s+/)
          : [...value.matchAll(/url\(#([^)"]+)\)/g)].map((match) => match[1]);
        if (/href$/.test(name) && value.startsWith("#")) asked.push(value.slice(1));
        asked.filter((id) => id && !known.has(id)).forEach((id) => found.push(`${tag(element)} names the id ${id}, which is not there`));
      }
    return found;
  }
  const structure = () => [
    ...headings(),
    ...ids(),
    ...faulty("html:not([lang])", () => true, "has no language"),
    ...faulty("svg[role=img]", (one) => !one.querySelector(":scope > title")?.textContent.trim(), "has no title"),
    ...faulty("svg[role=img]", (one) => !one.querySelector(":scope > desc")?.textContent.trim(), "has no desc"),
    ...faulty("svg:not([role=img])", (one) => one.getAttribute("aria-hidden") !== "true" && !one.closest("[aria-hidden=true]"), "has no role"),
    ...faulty("svg [id], svg [tabindex]", (one) => one.tabIndex >= 0 && one.localName !== "a" && one.hasAttribute("tabindex") && !name(one), "has no name"),
    ...faulty("table", (one) => !one.querySelector("th"), "has no head"),
    ...faulty("th", (one) => !["row", "col", "rowgroup", "colgroup"].includes(one.scope), "has no scope"),
    ...faulty("input:not([type=hidden]), select, textarea", (one) => !name(one), "has no label"),
    ...faulty("button, a[href]", (one) => !name(one) && !one.textContent.trim(), "says nothing"),
    ...faulty("[role=region], [tabindex='0']:not(svg *)", (one) => !name(one), "has no name"),
    ...faulty("[role=region]", (one) => scrolls(one) && one.tabIndex < 0, "scrolls and cannot be reached by keyboard"),
    ...faulty("[tabindex]", (one) => one.tabIndex > 0, "jumps the order of the keyboard"),
  ];

  const all = texts();
  return { num_texts: all.length, findings: [...tooWide(), ...cut(all), ...overlaps(all), ...small(all), ...pale(all), ...structure()] };
})();
