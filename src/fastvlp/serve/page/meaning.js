// What the fields, the scores and the words of a search mean.

export function captions(info) {
  const named = Object.keys(info).filter((name) => name.startsWith("caption")).sort();
  return named.flatMap((name) => String(info[name]).split("\n")).filter(Boolean);
}

// As many digits as tell the first result from the last.
export function digits(results) {
  const scores = results.map((hit) => hit.score);
  const range = Math.max(...scores) - Math.min(...scores);
  return range > 0 && results.length > 1 ? Math.min(5, Math.max(2, Math.ceil(1 - Math.log10(range)))) : 2;
}

// What a searcher should know of the words, as sentences.
export function remarks(page) {
  const lines = [];
  for (const { cut, unknown } of page.notes ?? []) {
    if (unknown.length) lines.push(`The model does not know: ${unknown.slice(0, 8).join(", ")}.`);
    if (cut) lines.push(`Not read, because the text is too long: “${cut.length > 80 ? `${cut.slice(0, 80)}…` : cut}”`);
  }
  if (page.near === false && page.results.length) lines.push("Nothing here is near to these words; these pictures are the least far.");
  if (page.can_tell === false && page.results.length) {
    lines.push("This model cannot tell whether a picture fits these words: random pictures are often as near to them. The best come first.");
  }
  return lines;
}
