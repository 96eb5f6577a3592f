"The verdicts in the text that an experiment keeps."

import re

HEAD = "| claim | here | in the paper | says |"


def cells_of(line):
    "The cells of a row of a table in Markdown."
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def verdicts(text):
    "Its verdicts, each a dictionary: claim, here, paper, says, and the marks of what it lacks."
    rows, lines = [], text.splitlines()
    for k, line in enumerate(lines):
        if line == HEAD:
            for row in lines[k + 2 :]:
                if not row.startswith("|"):
                    break
                claim, here, paper, says = cells_of(row)
                said, _, marks = says.partition(" (")
                rows.append(
                    {
                        "claim": claim,
                        "here": here,
                        "paper": paper,
                        "says": said,
                        "marks": marks.rstrip(")"),
                    }
                )
    return rows


def lacking_line(text):
    "The line that says what runs lack; empty if there is none."
    return next((x for x in text.splitlines() if x.startswith("**Not enough runs to say**")), "")
