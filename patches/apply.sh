#!/usr/bin/env bash
# Adds `import mup_megatron.megatron` to pretrain_gpt.py of a Megatron-LM checkout, or takes it out again.
#
#   patches/apply.sh CHECKOUT              add it; where it is there already, nothing is done
#   patches/apply.sh CHECKOUT --reverse    take it out: the file is then what it was, byte for byte
#   patches/apply.sh CHECKOUT --check      say what would be done, change nothing (with --reverse too)
#
# Exit status: 0 done, or nothing to do; 2 it cannot be done, and nothing was changed.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
name=pretrain_gpt.py

fail() {
  printf 'apply.sh: %s\n' "$*" >&2
  exit 2
}

usage() {
  sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

# What is asked for

checkout='' reverse=no check=no
for argument in "$@"; do
  case $argument in
    --reverse) reverse=yes ;;
    --check) check=yes ;;
    -h | --help)
      usage
      exit 0
      ;;
    -*) fail "unknown option $argument; there are --reverse and --check" ;;
    *)
      [ -z "$checkout" ] || fail "one checkout at a time: $checkout or $argument?"
      checkout=$argument
      ;;
  esac
done
[ -n "$checkout" ] || fail "which checkout of Megatron-LM? patches/apply.sh CHECKOUT [--reverse] [--check]"
command -v git >/dev/null || fail "git is needed: the patches are git's"

info=$checkout/megatron/core/package_info.py
[ -f "$info" ] || fail "$checkout is no checkout of Megatron-LM: it has no megatron/core/package_info.py"
[ -f "$checkout/$name" ] || fail "$checkout has no $name"
file=$(readlink -f "$checkout/$name")

number() { # number NAME: the first `NAME = digits` of package_info.py
  sed -n "s/^$1 *= *\([0-9][0-9]*\).*/\1/p" "$info" | head -n 1
}
major=$(number MAJOR) minor=$(number MINOR) micro=$(number PATCH)
[ -n "$major" ] && [ -n "$minor" ] && [ -n "$micro" ] || fail "$info does not say which version this is"
version=$major.$minor.$micro

# series, tag, head, head_sum, file_sum: this version's line of expected.txt

known=() found=no
while read -r series tag head head_sum file_sum; do
  case $series in '#'* | '') continue ;; esac
  known+=("$series")
  if [ "$series" = "$major.$minor" ]; then
    found=yes
    break
  fi
done <"$here/expected.txt"
[ $found = yes ] || fail "$checkout is Megatron-LM $version, and there are patches for ${known[*]}. The launcher," \
  "python -m mup_megatron.launch, needs none."
patch=$here/megatron-lm-${tag#core_v}.patch

# Everything happens on a copy. Git must not take the copy for a part of some repository around it.

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE
export GIT_CEILING_DIRECTORIES=${work%/*} GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_SYSTEM=/dev/null

sum() {
  sha256sum | cut -d ' ' -f 1
}

is_original() { # is_original FILE: are the lines around the place of the patch the known ones, and nothing in between?
  [ "$(head -n "$head" "$1" | sum)" = "$head_sum" ]
}

patched() { # patched FROM TO [--reverse]: TO becomes FROM with the patch; fails where the patch does not fit
  local folder
  folder=$(mktemp -d -p "$work") || return 1
  cp "$1" "$folder/$name" || return 1
  git -C "$folder" apply --unidiff-zero "${@:3}" "$patch" 2>/dev/null || return 1
  mv "$folder/$name" "$2"
}

explain_misfit() { # explain_misfit REASON
  printf 'apply.sh: %s/%s (Megatron-LM %s) is not what the patch expects: %s. Nothing was changed.\n' \
    "$checkout" "$name" "$version" "$1" >&2
  printf 'The launcher, python -m mup_megatron.launch, needs no patch. Or put this in by hand, before the first import of megatron:\n' >&2
  sed -n '/^+++/d; s/^+\(..*\)/    \1/p' "$patch" >&2
  exit 2
}

# What is there

line=$(grep -nE '^[[:space:]]*(import|from)[[:space:]]+mup_megatron' "$file" | head -n 1 | cut -d : -f 1) || line=''
if is_original "$file"; then
  [ -z "$line" ] || explain_misfit "it imports mup_megatron in line $line, where this patch does not put it"
  state=original
elif patched "$file" "$work/without" --reverse && is_original "$work/without"; then
  state=patched
elif [ -n "$line" ]; then
  explain_misfit "it imports mup_megatron in line $line, and the lines around it are not the known ones"
else
  explain_misfit "its first $head lines differ from those of $tag"
fi

original=$file
[ $state = original ] || original=$work/without
if [ "$(sum <"$original")" = "$file_sum" ]; then
  what="$checkout/$name (Megatron-LM $version, the file of $tag)"
else
  what="$checkout/$name (Megatron-LM $version, changed after line $head)"
fi

# What to do about it

if [ $reverse = yes ]; then
  [ $state = patched ] || { printf '%s has no patch: nothing to do.\n' "$what"; exit 0; }
  [ $check = no ] || { printf '%s has the patch, and it can be taken out.\n' "$what"; exit 0; }
  new=$work/without
else
  [ $state = original ] || { printf '%s has the patch already: nothing to do.\n' "$what"; exit 0; }
  new=$work/with
  if ! { patched "$file" "$new" && patched "$new" "$work/back" --reverse && cmp -s "$work/back" "$file"; }; then
    fail "$patch does not go into $file and out again. Nothing was changed."
  fi
  [ $check = no ] || { printf '%s: the patch fits.\n' "$what"; exit 0; }
fi

# The new file is complete beside the old one before it takes its place, so there is always one or the other.
beside=$file.mup-megatron.$$
trap 'rm -rf "$work" "$beside"' EXIT
# The copy gives it the old one's mode and owner.
{ cp -p "$file" "$beside" && cat "$new" >"$beside" && mv -f "$beside" "$file"; } || fail "$file could not be written. Nothing was changed."
if [ $reverse = yes ]; then
  printf '%s: the patch is taken out.\n' "$what"
else
  printf '%s: import mup_megatron.megatron is added. --reverse takes it out again.\n' "$what"
fi
