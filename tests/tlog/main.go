// Verifies a ledger with the transparency log libraries of the Go project, which share no code with Chancery: the checkpoint's signature,
// that every entry is in the tree, and that the tree begins with an older one.
//
//	tlog -url http://127.0.0.1:8080/ledger -key VERIFIER_KEY [-since OLD_CHECKPOINT] [-proof PROOF.json]
//
// Everything is read from tiles; of -proof (`chancery log prove --output json`) only the hashes are taken. Exit status 1 if anything does
// not fit.
package main

import (
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

const tileHeight = 8

func main() {
	url := flag.String("url", "", "where checkpoint and tiles are")
	key := flag.String("key", "", "the ledger's verifier key")
	since := flag.String("since", "", "a file with an older checkpoint")
	proof := flag.String("proof", "", "a file with an inclusion proof")
	flag.Parse()
	if err := run(*url, *key, *since, *proof); err != nil {
		fmt.Fprintln(os.Stderr, "tlog:", err)
		os.Exit(1)
	}
}

func run(url, key, since, proof string) error {
	verifier, err := note.NewVerifier(key)
	if err != nil {
		return fmt.Errorf("the key: %w", err)
	}
	signed, err := get(url + "/checkpoint")
	if err != nil {
		return err
	}
	tree, err := open(signed, verifier)
	if err != nil {
		return fmt.Errorf("the checkpoint: %w", err)
	}
	fmt.Printf("checkpoint of %d entries\n", tree.N)
	log := &ledger{url: url}
	// Checks every tile that it reads against the root in the checkpoint.
	hashes := tlog.TileHashReader(tree, log)
	if err := checkEntries(log, tree, hashes); err != nil {
		return err
	}
	if since != "" {
		if err := checkConsistency(since, verifier, tree, hashes); err != nil {
			return fmt.Errorf("consistency: %w", err)
		}
	}
	if proof != "" {
		return checkProof(proof, verifier)
	}
	return nil
}

// checkEntries verifies that each entry is where the tree has it.
func checkEntries(log *ledger, tree tlog.Tree, hashes tlog.HashReader) error {
	var next int64
	for next < tree.N {
		entries, err := log.entries(next/256, tree.N)
		if err != nil {
			return err
		}
		for _, entry := range entries {
			proof, err := tlog.ProveRecord(tree.N, next, hashes)
			if err != nil {
				return fmt.Errorf("entry %d: %w", next, err)
			}
			if err := tlog.CheckRecord(proof, tree.N, tree.Hash, next, tlog.RecordHash(entry)); err != nil {
				return fmt.Errorf("entry %d: %w", next, err)
			}
			next++
		}
	}
	fmt.Printf("inclusion of %d entries\n", next)
	return nil
}

func checkConsistency(file string, verifier note.Verifier, tree tlog.Tree, hashes tlog.HashReader) error {
	signed, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	old, err := open(signed, verifier)
	if err != nil {
		return err
	}
	proof, err := tlog.ProveTree(tree.N, old.N, hashes)
	if err != nil {
		return err
	}
	if err := tlog.CheckTree(proof, tree.N, tree.Hash, old.N, old.Hash); err != nil {
		return err
	}
	fmt.Printf("consistency of %d entries with %d\n", old.N, tree.N)
	return nil
}

// checkProof verifies a proof that Chancery made.
func checkProof(file string, verifier note.Verifier) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var said struct {
		Entry      int64    `json:"entry"`
		Bytes      []byte   `json:"bytes"`
		Checkpoint string   `json:"checkpoint"`
		Hashes     [][]byte `json:"hashes"`
	}
	if err := json.Unmarshal(text, &said); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	tree, err := open([]byte(said.Checkpoint), verifier)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	var proof tlog.RecordProof
	for _, bytes := range said.Hashes {
		var hash tlog.Hash
		if copy(hash[:], bytes) != len(hash) || len(bytes) != len(hash) {
			return fmt.Errorf("%s: a hash has %d bytes", file, len(bytes))
		}
		proof = append(proof, hash)
	}
	if err := tlog.CheckRecord(proof, tree.N, tree.Hash, said.Entry, tlog.RecordHash(said.Bytes)); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	fmt.Printf("proof of entry %d\n", said.Entry)
	return nil
}

// open verifies a checkpoint: origin, size and root, a line each (C2SP tlog-checkpoint).
func open(signed []byte, verifier note.Verifier) (tlog.Tree, error) {
	opened, err := note.Open(signed, note.VerifierList(verifier))
	if err != nil {
		return tlog.Tree{}, err
	}
	lines := strings.Split(opened.Text, "\n")
	if len(lines) < 4 || lines[0] != verifier.Name() {
		return tlog.Tree{}, errors.New("not a checkpoint of this ledger")
	}
	size, err := strconv.ParseInt(lines[1], 10, 64)
	if err != nil {
		return tlog.Tree{}, err
	}
	root, err := base64.StdEncoding.DecodeString(lines[2])
	if err != nil || len(root) != tlog.HashSize {
		return tlog.Tree{}, errors.New("the root is no hash")
	}
	tree := tlog.Tree{N: size}
	copy(tree.Hash[:], root)
	return tree, nil
}

// ledger reads tiles over HTTP.
type ledger struct {
	url string
}

func (l *ledger) Height() int { return tileHeight }

func (l *ledger) ReadTiles(tiles []tlog.Tile) ([][]byte, error) {
	var all [][]byte
	for _, tile := range tiles {
		// C2SP leaves the height out, which is always 8.
		path := "tile/" + strings.TrimPrefix(tile.Path(), fmt.Sprintf("tile/%d/", tileHeight))
		data, err := get(l.url + "/" + path)
		if err != nil {
			return nil, err
		}
		all = append(all, data)
	}
	return all, nil
}

func (l *ledger) SaveTiles([]tlog.Tile, [][]byte) {}

// entries reads a tile of entries: each with its length in two bytes before it.
func (l *ledger) entries(n, size int64) ([][]byte, error) {
	tile := tlog.Tile{H: tileHeight, L: -1, N: n, W: 256}
	if left := size - n*256; left < 256 {
		tile.W = int(left)
	}
	path := strings.Replace(tile.Path(), "tile/8/data/", "tile/entries/", 1)
	data, err := get(l.url + "/" + path)
	if err != nil {
		return nil, err
	}
	var entries [][]byte
	for len(data) >= 2 {
		length := int(binary.BigEndian.Uint16(data))
		if len(data) < 2+length {
			break
		}
		entries, data = append(entries, data[2:2+length]), data[2+length:]
	}
	if len(entries) != tile.W || len(data) != 0 {
		return nil, fmt.Errorf("%s: %d entries and %d bytes more, but %d entries are due", path, len(entries), len(data), tile.W)
	}
	return entries, nil
}

func get(url string) ([]byte, error) {
	response, err := http.Get(url)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		return nil, err
	}
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s: %s: %s", url, response.Status, strings.TrimSpace(string(body)))
	}
	return body, nil
}
