# A firmware of a few hundred bytes that tells whether an accelerator is one: it computes in ring 0,
# then in ring 3 with a page fault in between, checks the result and leaves through isa-debug-exit.
#
# Runs at 0xF0000, in the last 64 KiB below 1 MiB where a PC's firmware is seen; accelerator.py adds
# the jump at the reset vector. Port 0xE9 (debugcon) gets '0' before the work in ring 0, '1' between
# the two rings, '2' at the end. Exit value GOOD (qemu ends with 85) if all went well, else BAD (3).
#
#   as --64 -o accelerator_probe.o accelerator_probe.S
#   objcopy -O binary -j .text accelerator_probe.o accelerator_probe.bin

        .set    BASE, 0xF0000
        .set    PML4, 0x1000
        .set    PDPT, 0x2000
        .set    PD, 0x3000
        .set    GDT, 0x4000
        .set    TSS, 0x5000
        .set    IDT, 0x6000
        .set    KERNEL_STACK, 0x8000
        .set    USER_STACK, 0x9000
        .set    UNMAPPED, 0x200000
        .set    STEPS, 10000000
        .set    MULTIPLIER, 6364136223846793005
        .set    INCREMENT, 1442695040888963407
        # What 2 * STEPS steps of x = x * MULTIPLIER + INCREMENT make of 0, modulo 2^64.
        .set    EXPECTED, 0x5B9359AF52FEE100
        .set    GOOD, 42
        .set    BAD, 1

        .text
        .code16
start:
        cli
        cld
        # Page tables: the first 2 MiB mapped to themselves for both rings, the next 2 not at all.
        xorw    %ax, %ax
        movw    %ax, %es
        movl    $PDPT + 0x27, %es:PML4
        movl    $PD + 0x27, %es:PDPT
        movl    $0xE7, %es:PD
        # The processor writes to the descriptor of a task, so the table must not be in ROM.
        movw    %cs, %ax
        movw    %ax, %ds
        movw    $(gdt - start), %si
        movw    $GDT, %di
        movw    $(gdt_end - gdt), %cx
        rep movsb
        movw    $(gate_page_fault - start), %si
        movw    $(IDT + 14 * 16), %di
        movw    $16, %cx
        rep movsb
        movw    $(gate_done - start), %si
        movw    $(IDT + 0x80 * 16), %di
        movw    $16, %cx
        rep movsb
        lgdtl   (gdt_register - start)
        lidtl   (idt_register - start)
        # From real mode straight into long mode.
        movl    %cr4, %eax
        orl     $0x20, %eax
        movl    %eax, %cr4
        movl    $PML4, %eax
        movl    %eax, %cr3
        movl    $0xC0000080, %ecx
        rdmsr
        orl     $0x100, %eax
        wrmsr
        movl    %cr0, %eax
        orl     $0x80000001, %eax
        movl    %eax, %cr0
        ljmpl   $0x08, $(BASE + long_mode - start)

        .code64
long_mode:
        movl    $0x10, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    %eax, %ss
        movl    $KERNEL_STACK, %esp
        movq    $KERNEL_STACK, TSS + 4
        movl    $0x28, %eax
        ltr     %ax
        movb    $'0', %al
        outb    %al, $0xE9
        movabsq $MULTIPLIER, %rbx
        movabsq $INCREMENT, %rcx
        xorl    %esi, %esi
        movl    $STEPS, %edx
1:      imulq   %rbx, %rsi
        addq    %rcx, %rsi
        decl    %edx
        jnz     1b
        movb    $'1', %al
        outb    %al, $0xE9
        pushq   $0x1B
        pushq   $USER_STACK
        pushq   $0x02
        pushq   $0x23
        pushq   $(BASE + user - start)
        iretq

user:
        movl    $STEPS / 2, %edx
1:      imulq   %rbx, %rsi
        addq    %rcx, %rsi
        decl    %edx
        jnz     1b
        movq    %rsi, UNMAPPED
        xorl    %esi, %esi
        movq    UNMAPPED, %rsi
        movl    $STEPS / 2, %edx
1:      imulq   %rbx, %rsi
        addq    %rcx, %rsi
        decl    %edx
        jnz     1b
        int     $0x80

page_fault:
        movq    %cr2, %rax
        cmpq    $UNMAPPED, %rax
        jne     bad
        movq    $UNMAPPED + 0xE7, PD + 8
        addq    $8, %rsp
        iretq

done:
        movb    $'2', %al
        outb    %al, $0xE9
        cmpq    $0x23, 8(%rsp)
        jne     bad
        movabsq $EXPECTED, %rax
        cmpq    %rax, %rsi
        jne     bad
        movl    $GOOD, %eax
        jmp     leave
bad:
        movl    $BAD, %eax
leave:
        outl    %eax, $0xF4
        hlt
        jmp     leave

        .balign 8
gdt:
        .quad   0
        .quad   0x00AF9B000000FFFF      # 0x08 ring 0 code
        .quad   0x00CF93000000FFFF      # 0x10 ring 0 data
        .quad   0x00CFF3000000FFFF      # 0x18 ring 3 data
        .quad   0x00AFFB000000FFFF      # 0x20 ring 3 code
        .quad   0x0000890050000067, 0   # 0x28 the task: where the stack of ring 0 is
gdt_end:
gate_page_fault:
        .word   page_fault - start, 0x08, 0x8E00, BASE >> 16
        .quad   0
gate_done:
        .word   done - start, 0x08, 0xEE00, BASE >> 16
        .quad   0
gdt_register:
        .word   gdt_end - gdt - 1
        .long   GDT
idt_register:
        .word   0x81 * 16 - 1
        .long   IDT
