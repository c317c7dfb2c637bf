"""What is known of programs: which act on the shell, which run others, and what of git only reads.

The lists can never be whole, and nothing rests on that: a program that is on none is still allowed for a session only
word for word. They say where even that is not to be offered.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType


def _words(*texts: str) -> frozenset[str]:
    return frozenset(" ".join(texts).split())


BUILTINS = _words("""
    . : alias bg bind break builtin caller cd command compgen complete compopt continue declare dirs disown enable
    eval exec exit export fc fg getopts hash help history jobs let local logout mapfile popd pushd read readarray
    readonly return set shift shopt source suspend times trap type typeset ulimit umask unalias unset wait
""")
"""Builtins of bash that act on the shell itself, or that no program of the same name stands in for."""

_SHELLS = """
    ash bash busybox cmd csh dash elvish fish ksh mksh nu powershell pwsh rbash sh tcsh toybox wsl xonsh yash zsh
"""
_WRAPPERS = """
    arch at batch bwrap caffeinate cgexec choom chroot chronic chrt coproc cpulimit crontab daemonize dbus-run-session
    distrobox doas entr env expect faketime fakeroot find fd fdfind firejail flatpak-spawn flock gdb hyperfine i386 ifne
    inotifywait ionice ld ldd lldb linux linux32 linux64 ltrace machinectl mispipe newgrp nice nodemon nohup nsenter
    numactl open parallel pee perf pkexec prlimit proot proxychains pssh retry rr run-parts runcon runuser screen script
    setarch setpriv setsid sg start start-stop-daemon stdbuf strace su sudo sudoedit systemd-run taskset time timeout
    tmux toolbox torify torsocks tsocks unbuffer unshare valgrind vidir vipe watch watchexec watchman wine x86_64 xargs
    xdg-open xterm xvfb-run
"""
_INTERPRETERS = """
    R Rscript awk bc bun clisp clojure csi dc deno dotnet duckdb ed elixir emacs emacsclient erl escript ex fsi gawk ghc
    gnuplot go groovy guile iex info ipython irb java jshell julia jupyter kotlin latex lein less lua luajit lualatex m4
    man mawk mongo mongosh more most mysql nano nawk node nodejs ocaml octave osascript pager pdflatex pdftex perl php
    psql pypy python pythonw racket redis-cli ruby runghc runhaskell sbcl scala sed gsed gsort gtar gfind gxargs genv
    gawk sqlite sqlite3 swift tclsh tex ts-node tsx vi view vim nvim wish xelatex
"""
_BUILDERS = """
    ansible ansible-playbook ant apt apt-get aptitude bazel brew buck bunx c c++ cargo cc clang clang++ cmake composer
    conda corepack dnf dpkg flatpak g++ gcc gem gmake gradle gradlew hatch helm just ld.gold ld.lld make mamba meson
    mvn ninja nix nix-shell nox npm npx packer pacman pdm pip pipx pnpm pnpx poetry pre-commit pytest py.test rake rpm
    rustc salt sbt snap sphinx-build task terraform tofu tox turbo uv uvx vagrant yarn yum
"""
_WITH_EXEC_FLAGS = """
    ar bpftrace bsdtar buildah code cpio crictl cscope ctags ctr diff3 docker fzf gh glab gpg gpg2 groff hg install ip
    jj kubectl lazygit logrotate mail mailx mosh mutt nc ncat nerdctl netcat nm nmap oc objcopy openssl pandoc pax
    podman ranlib rg rclone rsync scp sdiff sftp socat sort split ssh ssh-add ssh-agent ssh-copy-id ssh-keygen sshpass
    star strip svn systemctl tar tcpdump telnet tig troff wget zip
"""
RUNS_OTHERS = _words(_SHELLS, _WRAPPERS, _INTERPRETERS.casefold(), _BUILDERS, _WITH_EXEC_FLAGS)
"""Programs that run other programs or code: by their purpose, or by a flag."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


def plain_name(program: str) -> str | None:
    """Return a program's name in the spelling of the lists: in lower case, without version or ending.

    None means that it is named by a path, or that it is no ordinary name.

    >>> plain_name("python3.11"), plain_name("GIT.exe"), plain_name("./git")
    ('python', 'git', None)
    """
    if not _NAME.fullmatch(program):
        return None
    name = re.sub(r"\.(?:exe|com|cmd|bat|sh|py)$", "", program.casefold())
    return name if name in RUNS_OTHERS else re.sub(r"[-.\d]+$", "", name) or name


_COMMITS = """
    -p -u -U= -s --patch --no-patch --stat --stat= --shortstat --numstat --name-only --name-status --summary --raw
    --oneline --decorate --decorate= --no-decorate --graph --all --branches --tags --merges --no-merges --first-parent
    --reverse --follow --abbrev-commit --abbrev= --format= --pretty --pretty= --date= --since= --until= --after=
    --before= --author= --committer= --grep= -n --max-count= --skip= --color= --no-color --no-ext-diff --no-textconv
    -w -b --word-diff --minimal --patience --histogram --unified= --find-renames --cached --staged --check
    --exit-code --quiet -- -i -E -F --full-index --relative -z -1
"""
GIT_READS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "blame": _words("-L -w -M -C -e -l -s --date= --porcelain --line-porcelain --"),
        "describe": _words("--tags --all --always --long --dirty --abbrev= --exact-match"),
        "diff": _words(_COMMITS),
        "log": _words(_COMMITS),
        "ls-files": _words("-c -d -m -o -s -u -z --cached --deleted --modified --others --stage --exclude-standard --"),
        "ls-tree": _words("-r -t -d -l -z --name-only --full-tree --long --"),
        "rev-parse": _words("--short --short= --verify --abbrev-ref --show-toplevel --git-dir --is-inside-work-tree"),
        "shortlog": _words("-s -n -e -sn -sne --summary --numbered --email --no-merges --since= --until= --"),
        "show": _words(_COMMITS),
        "status": _words("""-s -b -sb -v -z -u -uno -uall -unormal --short --branch --long --porcelain --porcelain=
            --ignored --untracked-files --untracked-files= --show-stash --no-renames --"""),
    }
)
"""Sub-commands of git that only read, with the flags that leave it at that: none writes a file or runs a program."""
