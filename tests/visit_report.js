// What tests/test_report.py does in a page of the report; `found` goes into the page around it.
const pick = (selector, root = document) => [...root.querySelectorAll(selector)];
const press = name => document.querySelector(`#filter [data-value=${name}]`).click();
const point = node => node.dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
const type = (node, key, shiftKey = false) =>
  node.dispatchEvent(new KeyboardEvent("keydown", {bubbles: true, key, shiftKey}));
const card = document.getElementById("card");
const found = {width: innerWidth, overflow: document.documentElement.scrollWidth - innerWidth};
for (const name of ["right", "wrong", "cut", "all"]) {
  press(name);
  found[name] = pick("#list article").map(node => node.className);
}
const look = async words => {
  const box = document.getElementById("search");
  box.value = words;
  box.dispatchEvent(new InputEvent("input"));
  await new Promise(done => setTimeout(done, 200));
};
await look(" G LONG");
found.searched = pick("#list article").length;
found.marked = [...CSS.highlights.get("found")].map(String);
await look("nothing");
found.nowhere = document.getElementById("count").textContent;
await look("}{2} <b>$x_");
document.getElementById("more").click();
found.everywhere = pick("#list article").length;
await look("");
const articles = pick("#list article");
found.text = articles.slice(0, 4).map(node => node.querySelector(".text").textContent);
found.problem = articles[0].querySelector(".problem").textContent;
found.levels = pick(".text > span").map(node => node.className);

// the card
found.hidden = card.hidden;
const inside = node => {
  node.scrollIntoView({block: "center"});
  point(node);
  const box = card.getBoundingClientRect();
  const fits = box.left >= 0 && box.top >= 0 && box.right <= innerWidth && box.bottom <= innerHeight;
  return fits && box.width > 150;
};
found.inside = pick("#list article:nth-child(-n+4) .text > span").every(inside);
const tokens = pick(".text > span", articles[1]);
found.cards = tokens.map(node => { point(node); return card.textContent; });
point(document.body);
found.left = card.hidden;
tokens[0].focus();
found.focused = !card.hidden && document.activeElement === tokens[0];
type(tokens[0], "ArrowRight");
found.moved = document.activeElement === tokens[1] && card.textContent === found.cards[1];
const strong = tokens.findIndex((node, i) => i > 2 && node.matches(".k3, .k4"));
type(tokens[strong - 2], "ArrowRight", true);
found.jumped = strong > 0 && document.activeElement === tokens[strong];
type(tokens[strong], "Escape");
found.escaped = card.hidden;
tokens[2].click();
found.tapped = !card.hidden && card.textContent === found.cards[2];
document.querySelector("h1").click();
found.away = card.hidden;
document.getElementById("more").click();
found.after_more = pick("#list article").length;
document.querySelector("#axis [data-value=tflops]").click();
found.charts = pick("figure svg").length;

// the least contrast of a text with what is behind it, as WCAG computes it
tokens[5].click();
const rgba = text => text.match(/[\d.]+/g).map(Number);
const over = ([r, g, b, a = 1], under) => [r, g, b].map((v, i) => v * a + under[i] * (1 - a));
const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
const light = color => color.reduce((sum, v, i) => sum + [.2126, .7152, .0722][i] * linear(v / 255), 0);
const behind = node =>
  node ? over(rgba(getComputedStyle(node).backgroundColor), behind(node.parentElement)) : [255, 255, 255];
found.worst = [99, ""];
for (const node of pick("body *")) {
  const hasText = [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
  if (!hasText || !node.getClientRects().length) continue;
  const style = getComputedStyle(node), back = behind(node);
  const ink = node.namespaceURI.endsWith("svg") ? style.fill : style.color;
  const [most, least] = [light(back), light(over(rgba(ink), back))].sort((a, b) => b - a);
  const ratio = (most + .05) / (least + .05);
  if (ratio < found.worst[0]) found.worst = [ratio, `${node.tagName} ${node.className} ${ink} on ${back}`];
}
found.page = getComputedStyle(document.body).backgroundColor;
const result = parent.document.createElement("pre");
parent.document.body.append(Object.assign(result, {id: "found", textContent: JSON.stringify(found)}));
