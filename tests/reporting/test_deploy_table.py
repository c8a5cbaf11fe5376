import io

import pytest
from deployments import ENSEMBLE, FLOAT, IMAGES, INT8, PRUNED, TEXT, TORCH, deployment
from deployments import text_deployment as of_text

from selfkd.cli.terminal import make_console, print_table
from selfkd.reporting.deploy_table import deploy_table


def test_each_form_is_a_row_beside_the_float_file():
    rows = TORCH, FLOAT, INT8, *PRUNED, ENSEMBLE
    table = deploy_table(deployment(*rows), IMAGES)
    assert [row[0] for row in table.rows] == [row.title for row in rows]
    int8 = dict(zip(table.head, table.rows[2], strict=True))
    assert int8["ms, 128"], int8["size"] == ("0.6", "27 kB")
    assert (int8["of its size"], int8["speed, 128"], int8["agreement"]) == (
        "0.27",
        "3.20x",
        "99.72%",
    )
    assert int8["difference, points"] == "-1.00 [-2.00, +0.40]"
    pruned = dict(zip(table.head, table.rows[4], strict=True))
    assert pruned["test acc"] == "94.00% ± 0.25%"
    said = {row[0]: row[2] for row in table.rows}
    assert (said[FLOAT.title], said[INT8.title]) == ("", "smaller, faster")
    assert said[ENSEMBLE.title] == "not smaller/faster"


def test_a_language_model_has_perplexity_and_tokens_a_second():
    table = deploy_table(of_text(), TEXT)
    int8 = dict(zip(table.head, table.rows[1], strict=True))
    assert (int8["test NLL"], int8["perplexity"], int8["tokens/s"]) == ("1.656", "5.2", "29,200")
    assert int8["difference, nats"] == "+0.006 [+0.004, +0.008]"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_narrow_terminal_keeps_what_is_not_gained(width):
    file = io.StringIO()
    console = make_console(file)
    console.width = width
    print_table(console, deploy_table(deployment(TORCH, FLOAT, INT8, ENSEMBLE), IMAGES))
    assert "not smaller/faster" in file.getvalue()
    assert max(map(len, file.getvalue().splitlines())) <= width
