// What tests/test_report.py does in a page of the report; `found` goes into the page.
const found = {width: innerWidth, title: document.title}, pick = (selector, all) => [...document.querySelectorAll(selector)];
const press = name => document.querySelector(`#filter [data-value=${name}]`).click();
const fire = (node, kind, more) => node.dispatchEvent(new (more ? KeyboardEvent : PointerEvent)(kind, {bubbles: true, ...more}));
const card = document.getElementById("card");
const inside = () => { const b = card.getBoundingClientRect(); return b.left >= 0 && b.top >= 0 && b.right <= innerWidth && b.bottom <= innerHeight && b.width > 150; };
found.overflow = document.documentElement.scrollWidth - innerWidth;
for (const name of ["right", "wrong", "cut", "all"]) { press(name); found[name] = pick("#list article").map(node => node.className); }
const articles = pick("#list article"), more = document.getElementById("more");
found.text = articles.slice(0, 4).map(node => node.querySelector(".text").textContent);
found.problem = articles[0].querySelector(".problem").textContent;
found.levels = pick(".text span").map(node => node.className);
found.hidden = card.hidden;
found.inside = pick("#list article:nth-child(-n+4) .text > span").map(node => {
  node.scrollIntoView({block: "center"});
  fire(node, "pointerover");
  return inside();
}).every(Boolean);
const tokens = [...articles[1].querySelectorAll(".text > span")];
found.cards = tokens.map(node => { fire(node, "pointerover"); return card.textContent; });
fire(document.body, "pointerover");
found.left = card.hidden;
tokens[0].focus();
found.focused = !card.hidden && document.activeElement === tokens[0];
fire(tokens[0], "keydown", {key: "ArrowRight"});
found.moved = document.activeElement === tokens[1] && card.textContent === found.cards[1];
fire(tokens[1], "keydown", {key: "Escape"});
found.escaped = card.hidden;
tokens[2].click();
found.tapped = !card.hidden && card.textContent === found.cards[2];
document.querySelector("h1").click();
found.away = card.hidden;
more.click();
found.after_more = pick("#list article").length;
tokens[5].click();
const rgba = text => text.match(/[\d.]+/g).map(Number);
const over = (top, under) => top.slice(0, 3).map((v, i) => v * (top[3] ?? 1) + under[i] * (1 - (top[3] ?? 1)));
const light = c => { const [r, g, b] = c.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
const backed = node => node ? over(rgba(getComputedStyle(node).backgroundColor), backed(node.parentElement)) : [255, 255, 255];
found.worst = [99, ""];
for (const node of document.body.querySelectorAll("*")) {
  const text = [...node.childNodes].filter(child => child.nodeType === 3 && child.textContent.trim());
  if (!text.length || !node.getClientRects().length) continue;
  const style = getComputedStyle(node), back = backed(node), ink = style.fill !== "rgb(0, 0, 0)" ? style.fill : style.color;
  const pair = [light(back), light(over(rgba(ink), back))].sort((a, b) => b - a), ratio = (pair[0] + .05) / (pair[1] + .05);
  if (ratio < found.worst[0]) found.worst = [ratio, `${node.tagName}.${node.className.baseVal ?? node.className} ${ink} on ${back}`];
}
found.page = getComputedStyle(document.body).backgroundColor;
parent.document.body.append(Object.assign(parent.document.createElement("pre"), {id: "found", textContent: JSON.stringify(found)}));
