"""Draw the chart of results: a bar with its interval for each method on each data set."""

from PIL import Image, ImageDraw, ImageFont

from data.draw import BLUE, GREEN, GREY, ORANGE

WIDTH, HEIGHT, TOP = 1200, 340, 56  # of the page, of a metric's part, of the legend
COLOURS = GREY, ORANGE, BLUE, GREEN
FONT, LARGE = ImageFont.load_default(18), ImageFont.load_default(22)


def chart(results):
    """results: {metric: {data set: {method: (mean, half of the interval)}}}, fractions; every data
    set with the same methods -> PIL image, 1,200 px wide, in per cent."""
    page = Image.new("RGB", (WIDTH, TOP + HEIGHT * len(results)), "white")
    pen = ImageDraw.Draw(page)
    methods = list(next(iter(next(iter(results.values())).values())))
    x = 90
    for method, colour in zip(methods, COLOURS):
        pen.rectangle((x, 18, x + 22, 40), colour)
        pen.text((x + 30, 29), method, "black", LARGE, anchor="lm")
        x += 70 + int(pen.textlength(method, LARGE))
    for i, (metric, groups) in enumerate(results.items()):
        draw_metric(pen, TOP + i * HEIGHT, metric, groups)
    return page


def draw_metric(pen, top, metric, groups):
    """Draw one metric's groups of bars; the axis ends above the highest interval."""
    left, right, bottom = 80, WIDTH - 20, top + HEIGHT - 46
    highest = max(mean + half for bars in groups.values() for mean, half in bars.values())
    limit = min(1.0, 1.15 * highest)

    def at(value):
        return bottom - (bottom - top - 30) * value / limit

    for step in (0.25, 0.5, 0.75, 1.0):
        if step <= limit:
            pen.line([(left, at(step)), (right, at(step))], (225, 225, 225))
            pen.text((left - 8, at(step)), f"{100 * step:.0f} %", "black", FONT, anchor="rm")
    pen.text((left - 8, top + 4), metric, "black", LARGE, anchor="lm")
    pen.line([(left, bottom), (right, bottom)], "black")
    group_width = (right - left) / len(groups)
    for i, (name, bars) in enumerate(groups.items()):
        start, width = left + i * group_width + 20, (group_width - 40) / len(bars)
        pen.text((left + (i + 0.5) * group_width, bottom + 24), name, "black", LARGE, anchor="mm")
        for j, ((mean, half), colour) in enumerate(zip(bars.values(), COLOURS)):
            x = start + j * width
            pen.rectangle((x, at(mean), x + width - 6, bottom), colour)
            middle = x + width / 2 - 3
            if half:
                pen.line([(middle, at(mean - half)), (middle, at(mean + half))], "black", 2)
                for end in (mean - half, mean + half):
                    pen.line([(middle - 6, at(end)), (middle + 6, at(end))], "black", 2)
            pen.text((middle, at(mean + half) - 5), f"{100 * mean:.1f}", "black", FONT, anchor="mb")
