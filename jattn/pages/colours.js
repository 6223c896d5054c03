// Small pictures: how dark a cell is, is the square root of its weight, so that small
// weights are seen. The colour comes from the style, and the theme changes it.

function drawPicture(canvas, cells, [rows, columns], colour, none) {
  canvas.width = columns;
  canvas.height = rows;
  const image = new ImageData(columns, rows);
  for (let i = 0; i < cells.length; i++) {
    const unknown = Number.isNaN(cells[i]);
    image.data.set(unknown ? none : colour, 4 * i);
    image.data[4 * i + 3] = unknown ? 255 : 255 * Math.sqrt(Math.min(cells[i], 1));
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// Of 0…1, how much colour: roots again, so that 1 % and 10 % differ to the eye.
const shade = (share) => Math.sqrt(Math.min(Math.max(share || 0, 0), 1)).toFixed(2);
