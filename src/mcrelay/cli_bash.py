"""Bash's completion, in the place of click's.

Bash cuts words at = and : as well as at spaces, so that an address or COMPONENT=LEVEL comes in pieces: here the line is
read as it was typed, and what stands before bash's last cut is left out of what it gets.
"""

from __future__ import annotations

import os
from typing import Final

from click.shell_completion import BashComplete, add_completion_class, split_arg_string

SOURCE: Final = r"""%(complete_func)s() {
    local IFS=$'\n' line=${COMP_LINE:0:COMP_POINT} cuts= before= type value
    [[ $COMP_WORDBREAKS == *=* ]] && cuts+==
    [[ $COMP_WORDBREAKS == *:* ]] && cuts+=:
    local word=${line##*[[:space:]]}
    [[ $cuts && $word == *[$cuts]* ]] && before=${word%%"${word##*[$cuts]}"}
    COMPREPLY=()
    while IFS=, read -r type value; do
        case $type in
        file) compopt -o default ;;
        dir) compopt -o dirnames ;;
        plain) COMPREPLY+=("${value#"$before"}") ;;
        esac
    done < <(env COMP_WORDS="$line" %(complete_var)s=bash_complete "$1" 2>/dev/null)
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""


class Bash(BashComplete):
    source_template = SOURCE

    def get_completion_args(self) -> tuple[list[str], str]:
        """The words before the one that was begun, and that."""
        line = os.environ["COMP_WORDS"]
        words = split_arg_string(line)
        begun = words.pop() if words and not line[-1:].isspace() else ""
        return words[1:], begun


def take_place() -> None:
    add_completion_class(Bash)
