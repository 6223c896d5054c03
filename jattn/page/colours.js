// Draws small pictures. The darkness of a cell is the square root of its weight, so that
// small weights are visible. The colour comes from the style, and the theme changes it.

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

// Gives the amount of colour for a share 0…1: a root, so that the eye tells 1 % from 10 %.
const shade = (share) => Math.sqrt(Math.min(Math.max(share || 0, 0), 1)).toFixed(2);
