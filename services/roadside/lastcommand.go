package roadside

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"sync"
)

// commandFile remembers the highest sequence of a command that was obeyed, in
// two places that take turns: a write that is torn leaves the other.
//
// It is written at each command and not synced, which would wear out the disk
// for little: kill -9 takes nothing, a power cut what the kernel had not written
// yet. What is left to a replay after that is a command that rests on a frame of
// this boot ([RuleBoot]) and has not expired, and there is none that is old.
type commandFile struct {
	mu   sync.Mutex
	f    *os.File // nil: nothing is written
	seq  uint64
	turn int64
	errs uint64
}

const commandPlace = 512 // a sector each

// open reads what is there; places that cannot be read count as empty.
func (c *commandFile) open(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	c.f = f
	for place := range int64(2) {
		b := make([]byte, len(commandLine(0)))
		if _, err := f.ReadAt(b, place*commandPlace); err != nil {
			if errors.Is(err, io.EOF) {
				continue
			}
			return errors.Join(err, f.Close())
		}
		var seq uint64
		if _, err := fmt.Sscanf(string(b), "%d", &seq); err == nil && string(commandLine(seq)) == string(b) && seq > c.seq {
			c.seq, c.turn = seq, 1-place
		}
	}
	return nil
}

func commandLine(seq uint64) []byte {
	b := fmt.Appendf(nil, "%020d", seq)
	return fmt.Appendf(b, " %08x\n", crc32.ChecksumIEEE(b))
}

func (c *commandFile) last() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.seq
}

func (c *commandFile) errors() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.errs
}

// obeyed remembers a command. The error is of writing it.
func (c *commandFile) obeyed(seq uint64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if seq <= c.seq {
		return nil
	}
	c.seq = seq
	if c.f == nil {
		return nil
	}
	if _, err := c.f.WriteAt(commandLine(seq), c.turn*commandPlace); err != nil {
		c.errs++
		return err
	}
	c.turn = 1 - c.turn
	return nil
}

func (c *commandFile) close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.f == nil {
		return nil
	}
	err := errors.Join(c.f.Sync(), c.f.Close())
	c.f = nil
	return err
}
